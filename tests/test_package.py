"""Exported packages: whole, checked, on one file of weights, and never half there."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest
import torch

import foveate
from foveate import package
from foveate.backends.tensorrt.lint import lint
from foveate.errors import ArtifactError, BackendError, InputError, ParityError
from foveate.model import OptimizedModel
from foveate.models.random import random_inputs, random_llava

PASSES = (
    "neighbor-attention{radius=1},drop-visual-heads{keep=2,from_layer=1},drop-visual-neurons{keep=0.5},"
    "fastv{layer=1,keep=0.5}"
)


@pytest.fixture(scope="module")
def model() -> OptimizedModel:
    return foveate.optimize(random_llava(layers=3), PASSES)


@pytest.fixture(scope="module")
def whole(model: OptimizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "out"
    found = foveate.export(model, output=folder)
    assert found.parity is not None and found.parity.ok and found.parity.tokens and found.parity.difference < 1e-5
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_a_package_answers_as_the_model_does(model: OptimizedModel, whole: Path) -> None:
    there = foveate.load(whole)
    assert there.backend == "onnx"
    for prompt in ({}, {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"}, {"text_tokens": 30}):
        inputs = random_inputs(random_llava(layers=3), **prompt)
        with torch.inference_mode():
            expected, found = model(**inputs), there(**inputs)
            answers = [each.generate(**inputs, max_new_tokens=20, do_sample=False) for each in (model, there)]
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
        assert torch.equal(found.kept[1], expected.kept[1])
        assert torch.equal(*answers)


def test_it_runs_eagerly_too(model: OptimizedModel, whole: Path) -> None:
    there = foveate.load(whole, backend="eager")
    inputs = random_inputs(random_llava(layers=3))
    assert torch.equal(there(**inputs).logits, model(**inputs).logits)


def test_weights_are_there_once_and_slices_of_rows_are_parts_of_them(whole: Path) -> None:
    prefill = onnx.load(whole / "decoder_prefill.onnx", load_external_data=False)
    places = {}
    for tensor in prefill.graph.initializer:
        if tensor.external_data:
            entry = {each.key: each.value for each in tensor.external_data}
            assert entry["location"] == "model.safetensors"
            places[tensor.name] = (int(entry["offset"]), int(entry["length"]))
        else:
            assert len(tensor.raw_data) < 2000
    name = "model.language_model.layers.1.mlp.gate_proj.weight"
    part = next(place for label, place in places.items() if label.startswith(f"{name}["))
    assert places[name][0] == part[0] and part[1] < places[name][1]


def test_graphs_hold_standard_operators_of_one_opset_and_named_axes(whole: Path) -> None:
    for path in whole.glob("*.onnx"):
        graph = onnx.load(path, load_external_data=False)
        assert [(each.domain, each.version) for each in graph.opset_import] == [("", 23)]
        assert {node.domain for node in graph.graph.node} == {""}
    step = onnx.load(whole / "decoder_step.onnx", load_external_data=False).graph
    shapes = {each.name: [d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim] for each in step.input}
    assert shapes["past_key_values.2.key"] == ["batch", 4, "past_tokens", 16]
    assert shapes["visual.2.key"] == ["batch", 2, "floor_0_5_visual_tokens", 16]


def test_tensorrts_parser_would_take_every_graph(whole: Path) -> None:
    for path in whole.glob("*.onnx"):
        assert lint(path) == []


def test_the_same_model_gives_the_same_files(model: OptimizedModel, whole: Path, tmp_path: Path) -> None:
    foveate.export(model, output=tmp_path / "again", verify=False)
    for path in whole.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("name", ["decoder_prefill.onnx", "embed_tokens.onnx", "model.safetensors", "program.txt"])
@pytest.mark.parametrize("damage", ["pickle", "cut", "missing", "link"])
def test_every_damage_is_one_error_that_names_the_file(name: str, damage: str, copy: Path) -> None:
    path = copy / name
    content = path.read_bytes()
    path.unlink()
    if damage == "pickle":
        path.write_bytes(pickle.dumps(Planted()))
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "link":
        path.symlink_to("/etc/passwd")
    with pytest.raises(ArtifactError, match=name):
        foveate.load(copy)


@pytest.mark.parametrize("name", ["decoder_prefill.onnx", "model.safetensors"])
def test_a_forged_file_with_the_right_hash_runs_no_pickle(name: str, copy: Path) -> None:
    (copy / name).write_bytes(pickle.dumps(Planted()))
    manifest = json.loads((copy / "foveate.json").read_text())
    manifest["files"][name] = hashlib.sha256((copy / name).read_bytes()).hexdigest()
    (copy / "foveate.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=name):
        foveate.load(copy)


class Planted:
    """Unpickling it would end the test run."""

    def __reduce__(self) -> tuple[object, ...]:
        return sys.exit, ("a pickle was read",)


def test_weights_outside_the_folder_are_refused(copy: Path, tmp_path: Path) -> None:
    shutil.copy(copy / "model.safetensors", tmp_path / "other")
    path = copy / "decoder_step.onnx"
    graph = onnx.load(path, load_external_data=False)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = "../other"
    path.write_bytes(graph.SerializeToString())
    manifest = json.loads((copy / "foveate.json").read_text())
    manifest["files"][path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copy / "foveate.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="decoder_step"):
        foveate.load(copy)


def test_a_newer_format_says_so(copy: Path) -> None:
    manifest = json.loads((copy / "foveate.json").read_text())
    (copy / "foveate.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(ArtifactError, match="format 99"):
        foveate.load(copy)


def test_a_full_disk_is_one_error_and_leaves_nothing(
    model: OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ArtifactError, match="No space left"):
        foveate.export(model, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_does_not_agree_with_torch_is_not_kept(
    model: OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "TOLERANCE", {torch.float32: 0.0})
    with pytest.raises(ParityError, match=r"do not agree.*0e\+00 allowed"):
        foveate.export(model, output=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_for_tensorrt_a_build_is_prepared_and_said_not_to_be_one(model: OptimizedModel, tmp_path: Path) -> None:
    found = foveate.export(model, backend="tensorrt", output=tmp_path / "out", verify=False, sizes={"batch": (1, 2, 4)})
    assert found.tensorrt.status == "prepared, not built" and "TensorRT" in found.tensorrt.missing[0]
    assert "prepared, not built" in str(found) and "build_trt.py" in str(found)
    spans = json.loads((tmp_path / "out" / "trt" / "profiles.json").read_text())["graphs"]
    assert spans["decoder_step"]["visual.2.key"] == {"min": [1, 2, 8, 16], "opt": [2, 2, 8, 16], "max": [4, 2, 32, 16]}
    told = json.loads((tmp_path / "out" / "foveate.json").read_text())["tensorrt"]
    assert told == {"status": found.tensorrt.status, "missing": list(found.tensorrt.missing)}
    assert (tmp_path / "out" / "trt" / "decoder_step.in.json").is_file()
    assert "TRT_decomposable" in str(onnx.load(tmp_path / "out" / "decoder_prefill.trt.onnx", load_external_data=False))
    assert foveate.load(tmp_path / "out").backend == "onnx"


def test_ranges_are_those_of_axes_that_are_there(model: OptimizedModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no graph has an axis 'batches'"):
        foveate.export(model, backend="tensorrt", output=tmp_path / "out", verify=False, sizes={"batches": (1, 1, 1)})
    with pytest.raises(BackendError, match="sizes are those of TensorRT"):
        foveate.export(model, output=tmp_path / "out", sizes={"batch": (1, 1, 1)})
    assert not list(tmp_path.iterdir())


def test_a_backend_that_is_not_there_is_refused(model: OptimizedModel, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="'coreml'"):
        foveate.export(model, backend="coreml", output=tmp_path / "out")


@pytest.mark.slow
def test_an_export_killed_at_any_point_leaves_a_whole_package_or_none(tmp_path: Path) -> None:
    code = (
        "import sys, foveate; from foveate.models.random import random_llava; "
        "model = foveate.optimize(random_llava(layers=2)); print('go', flush=True); "
        f"foveate.export(model, output={str(tmp_path / 'out')!r})"
    )
    drawn = random.Random(0)
    whole, count = 0, 0
    for turn in range(6):
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "go\n"
        if turn == 0:
            assert process.wait() == 0
            count = files_below(tmp_path)
        # When some of the files are there, more in each turn; in the last one all, which are then checked.
        wanted = count * min(1, (turn - 1 + drawn.random()) / 4)
        while process.poll() is None and files_below(tmp_path) < wanted:
            time.sleep(0.001)
        process.kill()
        process.wait()
        if (tmp_path / "out").exists():
            foveate.load(tmp_path / "out")
            whole += 1
        for left in tmp_path.iterdir():
            shutil.rmtree(left)
    assert 1 <= whole < 5


def files_below(folder: Path) -> int:
    """How many files there are, folders that vanish meanwhile left out."""
    return sum(len(names) for _, _, names in os.walk(folder))
