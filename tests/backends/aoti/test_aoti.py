"""Graphs compiled by AOTInductor compute what eager torch does, whatever the sizes; later starts compile nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.backends.aoti import lowering
from foveate.backends.aoti.compiling import _culprit, text_of
from foveate.backends.aoti.inputs import check_inputs
from foveate.backends.aoti.lowering import key_of, lower
from foveate.backends.regions import regions
from foveate.errors import ArtifactError, BackendError, FoveateWarning, InputError
from foveate.ir.program import info
from foveate.model import OptimizedModel
from foveate.models.random import random_inputs, random_llava
from tests.ir.programs import pruned, weightless

PASSES = (
    "neighbor-attention{radius=1},drop-visual-heads{keep=2,from_layer=1},drop-visual-neurons{keep=0.5},"
    "fastv{layer=1,keep=0.5}"
)
PROMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"},
    {"text_tokens": 30},
    {"images": 0},
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache, for this file."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache") / "foveate"
        patch.setenv("FOVEATE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def model() -> OptimizedModel:
    return foveate.optimize(random_llava(layers=3), PASSES)


@pytest.fixture(scope="module")
def exported(model: OptimizedModel, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("aoti") / "out"
    found = foveate.export(model, backend="aoti", output=folder)
    assert found.parity is not None and found.parity.ok and found.parity.tokens and found.parity.difference < 1e-5
    built = found.compiled
    assert built.regions == built.compiled == len(list((cache / "aoti").iterdir())) == 3
    assert f"3 of 3 regions compiled in {built.compile_s:.1f} s" in str(found)
    assert found.to_json()["compiled"]["cache"] == str(cache / "aoti")
    return folder


@pytest.mark.slow
def test_it_answers_as_eager_torch_does_for_prompts_of_any_size(model: OptimizedModel, exported: Path) -> None:
    there = foveate.load(exported)
    assert there.backend == "aoti"
    for prompt in PROMPTS:
        inputs = random_inputs(random_llava(layers=3), **prompt)
        with torch.inference_mode():
            expected, found = model(**inputs), there(**inputs)
            answers = [each.generate(**inputs, max_new_tokens=20, do_sample=False) for each in (model, there)]
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
        assert (found.kept is None) == (expected.kept is None)
        assert found.kept is None or torch.equal(found.kept[1], expected.kept[1])
        assert torch.equal(*answers)
    with pytest.raises(InputError, match="aoti backend does not train"):
        there(**inputs, labels=inputs["input_ids"])


@pytest.mark.slow
def test_the_folder_is_an_ordinary_one_without_code(model: OptimizedModel, exported: Path, cache: Path) -> None:
    names = ["config.json", "foveate.json", "generation_config.json", "model.safetensors", "program.txt"]
    assert sorted(path.name for path in exported.iterdir()) == names
    inputs = random_inputs(random_llava(layers=3))
    assert torch.equal(foveate.load(exported, backend="eager")(**inputs).logits, model(**inputs).logits)
    for code in cache.glob("aoti/*/region.so"):
        assert code.stat().st_size < 2**21


@pytest.mark.slow
def test_a_later_process_compiles_nothing_and_needs_no_compiler(exported: Path, model: OptimizedModel) -> None:
    code = (
        "import foveate; from foveate.models.random import random_inputs, random_llava\n"
        f"there = foveate.load({str(exported)!r})\n"
        "print(int(there(**random_inputs(random_llava(layers=3))).logits.argmax()))\n"
    )
    environment = {**os.environ, "PATH": "", "CXX": "none"}
    done = subprocess.run(
        [sys.executable, "-W", "error::foveate.errors.FoveateWarning", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    token = int(model(**random_inputs(random_llava(layers=3))).logits.argmax())
    assert done.stdout.split() == [str(token)]


@pytest.mark.slow
def test_exporting_again_finds_what_is_there(exported: Path, tmp_path: Path) -> None:
    args = [
        "-m",
        "foveate.cli.main",
        "export",
        str(exported),
        "--backend",
        "aoti",
        "-o",
        str(tmp_path / "again"),
        "--no-verify",
        "--json",
    ]
    result = subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["backend"] == "aoti" and said["parity"] is None
    assert said["compiled"]["regions"] == 3 and said["compiled"]["compiled"] == 0
    assert said["compiled"]["open_s"] > 0


@pytest.mark.slow
def test_code_that_is_not_what_was_compiled_is_not_run(
    exported: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(cache, tmp_path / "other"))
    monkeypatch.setenv("FOVEATE_CACHE", str(other))
    foveate.load(exported)
    code = next(other.glob("aoti/*/region.so"))
    content = bytearray(code.read_bytes())
    content[-1] ^= 1
    code.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"region.so is not what was compiled"):
        foveate.load(exported)
    assert foveate.load(exported, backend="eager").backend == "eager"


@pytest.mark.slow
def test_code_that_is_not_there_is_compiled_again_and_said_so(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "empty"))
    compiled: list[int] = []

    def compile_region(*args: Any) -> None:
        compiled.append(1)
        raise BackendError("compiled")

    monkeypatch.setattr(lowering, "compile_region", compile_region)
    with pytest.warns(FoveateWarning, match="holds no code compiled for it by torch"), pytest.raises(BackendError):
        foveate.load(exported)
    assert compiled == [1] and list((tmp_path / "empty" / "aoti").iterdir()) == []
    manifest = json.loads((exported / "foveate.json").read_text())
    other = Path(shutil.copytree(exported, tmp_path / "out"))
    manifest["versions"]["torch"] = "1.0"
    (other / "foveate.json").write_text(json.dumps(manifest))
    with pytest.warns(FoveateWarning, match=r"exported with torch 1\.0"), pytest.raises(BackendError):
        foveate.load(other)


@pytest.mark.slow
def test_without_a_compiler_one_line_says_so(tmp_path: Path) -> None:
    code = (
        "import foveate; from foveate.models.random import random_llava\n"
        "from foveate.errors import BackendError\n"
        "try:\n    foveate.optimize(random_llava(layers=1), backend='aoti')\n"
        "except BackendError as error:\n    print(error)"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "none", "FOVEATE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout == "the aoti backend needs a C++ compiler (g++ or clang++) on this machine\n", done.stderr
    assert list((tmp_path / "cache" / "aoti").iterdir()) == []


def test_compiling_says_so_once_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))

    def compile_region(*args: Any) -> None:
        raise BackendError("compiled")

    monkeypatch.setattr(lowering, "compile_region", compile_region)
    program = pruned("")
    with pytest.raises(BackendError, match="compiled"):
        lower(program, program.prefill, "prefill")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("foveate: AOTInductor compiles the prefill graph, which may take minutes, this once")
    assert line.endswith(f"it is kept in {tmp_path / 'aoti'}")


def test_what_cannot_be_compiled_is_named_by_its_pass() -> None:
    for region in regions(pruned("fastv{layer=1,keep=0.5}").prefill):
        for node in (n for n in region.graph.nodes if n.op == "call_function" and info(n).by == "fastv"):
            said = _culprit(RuntimeError(f"no such op\n  target: {node.target}\n"), region)
            assert said.startswith(f"{node.target}, which ") and "fastv" in said and "no such op" in said
            return
    raise AssertionError("fastv made nothing")


def test_entries_differ_by_what_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    (region, *_) = regions(pruned("").prefill)
    before = key_of(region)
    assert key_of(region) == before
    for name, value in {"torch": "2.0", "cpu": ["another"], "foveate": "0", "onednn": None, "options": {}}.items():
        with monkeypatch.context() as patch:
            changed = {**lowering.environment(), name: value}
            patch.setattr(lowering, "environment", lambda changed=changed: changed)
            assert key_of(region) != before


@pytest.mark.slow
def test_a_region_has_the_same_text_in_a_program_that_was_read_again(tmp_path: Path) -> None:
    made = foveate.optimize(random_llava(layers=3), PASSES)
    made.save_pretrained(tmp_path / "saved")
    read = foveate.load(tmp_path / "saved")
    texts = [[text_of(r) for g in each.program.graphs.values() for r in regions(g)] for each in (made, read)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 10


def test_inputs_that_native_code_would_misread_are_refused() -> None:
    program = pruned("")
    graph = program.graphs["decode"]
    sizes = {"batch": 2, "visual_tokens": 16, "past_tokens": 5, "text_tokens": 1}
    inputs: dict[str, Any] = {}
    for name, value in ((str(n.target), n.meta["val"]) for n in graph.nodes if n.op == "placeholder"):
        if not isinstance(value, torch.Tensor):
            inputs[name] = -1
            continue
        names = program.symbols.names()
        shape = [
            int(s.node.expr.subs({k: sizes.get(v, 3) for k, v in names.items()})) if isinstance(s, torch.SymInt) else s
            for s in value.shape
        ]
        inputs[name] = torch.zeros(shape, dtype=value.dtype)
    check = check_inputs(graph)
    check(inputs)
    for name, value, text in (
        ("text", inputs["text"].double(), "text must be a tensor of torch.float32 with 3 axes"),
        ("text", inputs["text"][0], "with 3 axes"),
        ("past_k_1", inputs["past_k_1"][:, :, 1:], "past_k_1 is .*axis 2 must have size 5"),
        ("past_k_1", inputs["past_k_1"][..., 1:], "axis 3 must have size 8"),
        ("prefix", -2, "prefix must be a whole number from -1 on"),
    ):
        with pytest.raises(InputError, match=text):
            check({**inputs, name: value})


def test_another_device_is_refused() -> None:
    program = weightless()[1]
    with pytest.raises(BackendError, match="runs on CPUs, and this model is on meta"):
        lower(program, program.prefill, "prefill")
