"""A package gets all that a TensorRT build needs, and says that it was not built."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

from foveate.backends.tensorrt import prepare as module
from foveate.backends.tensorrt import scripts
from foveate.backends.tensorrt.prepare import PREPARED, Status, importable, prepare
from foveate.backends.tensorrt.references import inputs_json, outputs_json
from foveate.backends.tensorrt.scripts import Options
from foveate.errors import ArtifactError, BackendError, InputError
from tests.backends.tensorrt.models import FLOAT, decoder, model

RANGES = {"batch": (1, 1, 4), "visual_tokens": (2, 16, 64), "text_tokens": (1, 8, 32)}
polygraphy = pytest.mark.skipif(find_spec("polygraphy") is None, reason="polygraphy is not installed")
ADD = model([helper.make_node("Add", ["x", "x"], ["y"])], {"x": (FLOAT, ["batch", "text_tokens"])})
Arrays = dict[str, np.ndarray]


without_tensorrt = pytest.mark.skipif(importable(), reason="TensorRT is installed")


@pytest.fixture(autouse=True)
def _no_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "importable", lambda: False)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    decoder(folder / "decoder_prefill.onnx")
    (folder / "embed_tokens.onnx").write_bytes(ADD.SerializeToString())
    return folder


@pytest.fixture
def references(package: Path) -> dict[str, tuple[Arrays, Arrays]]:
    x = np.random.default_rng(1).standard_normal((2, 16, 8)).astype(np.float32)
    session = ort.InferenceSession(str(package / "decoder_prefill.onnx"), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return {"decoder_prefill": ({"x": x}, dict(zip(names, session.run(None, {"x": x}))))}


@polygraphy
def test_everything_is_written_and_nothing_pretends_to_be_an_engine(
    package: Path, references: dict[str, tuple[Arrays, Arrays]]
) -> None:
    before = {p.name: p.read_bytes() for p in package.iterdir()}
    status = prepare(package, RANGES, references)
    assert status == Status(PREPARED, ("TensorRT (import tensorrt fails)",), "python3 trt/build_trt.py", ())
    assert str(status).startswith("TensorRT: prepared, not built; missing: TensorRT")
    assert {p.name for p in package.iterdir()} == {*before, "decoder_prefill.trt.onnx", "trt"}
    assert all((package / name).read_bytes() == content for name, content in before.items())
    assert {p.name for p in (package / "trt").iterdir()} == {
        "lint.json",
        "profiles.json",
        "status.json",
        "trtexec.sh",
        "build_trt.py",
        "build_decoder_prefill.py",
        "build_embed_tokens.py",
        "decoder_prefill.in.json",
        "decoder_prefill.out.json",
    }
    kept = {name: json.loads((package / "trt" / name).read_text()) for name in ("status.json", "lint.json")}
    assert kept["status.json"]["status"] == PREPARED
    assert kept["lint.json"]["graphs"]["decoder_prefill"]["findings"] == []
    assert kept["lint.json"]["graphs"]["embed_tokens"]["operators"] == {"Add": 1}
    profiles = json.loads((package / "trt" / "profiles.json").read_text())
    assert profiles["graphs"]["decoder_prefill"]["x"]["max"] == [4, 64, 8]


def test_the_copy_for_tensorrt_differs_in_attention_alone_and_has_the_same_weights(package: Path) -> None:
    prepare(package, RANGES)
    original, copy = (onnx.load(package / f"decoder_prefill{end}") for end in (".onnx", ".trt.onnx"))
    for a, b in zip(original.graph.node, copy.graph.node, strict=True):
        if a.op_type == "Attention":
            assert {x.name: helper.get_attribute_value(x) for x in b.attribute} == {
                "is_causal": 1,
                "TRT_decomposable": 1,
            }
            del a.attribute[:], b.attribute[:]
    assert original == copy
    assert not (package / "embed_tokens.trt.onnx").exists()


def test_onnx_and_onnx_runtime_refuse_weights_outside_the_folder(package: Path) -> None:
    """Why the copy lies beside the weights and not in trt/."""
    (package / "trt").mkdir()
    decoder(package / "decoder_prefill.onnx", weights="../model.safetensors")
    (package / "decoder_prefill.onnx").rename(package / "trt" / "decoder_prefill.onnx")
    with pytest.raises(onnx.checker.ValidationError, match="outside"):
        onnx.load(package / "trt" / "decoder_prefill.onnx")
    with pytest.raises(Exception, match="escapes model directory"):
        ort.InferenceSession(str(package / "trt" / "decoder_prefill.onnx"), providers=["CPUExecutionProvider"])


@polygraphy
def test_build_scripts_are_polygraphys_own_with_paths_from_the_package(
    package: Path, references: dict[str, tuple[Arrays, Arrays]]
) -> None:
    prepare(package, RANGES, references, Options(refit=True, weight_streaming=True, tolerance=0.05))
    text = (package / "trt" / "build_decoder_prefill.py").read_text()
    compile(text, "build", "exec")
    assert str(package) not in text
    assert "Template auto-generated by polygraphy" in text
    assert "NetworkFromOnnxPath('decoder_prefill.trt.onnx', strongly_typed=True" in text
    assert "Profile().add('x', min=[1, 2, 8], opt=[1, 16, 8], max=[4, 64, 8])" in text
    assert "load_timing_cache='trt/timing.cache'" in text
    assert "save_timing_cache='trt/timing.cache'" in text
    assert "refittable=True" in text
    assert "weight_streaming=True" in text
    assert "'trt/decoder_prefill.engine'" in text
    assert "trt/decoder_prefill.out.json" in text
    assert "0.05" in text
    compile((package / "trt" / "build_trt.py").read_text(), "build", "exec")


@polygraphy
@without_tensorrt
def test_without_tensorrt_the_build_fails_and_says_what_it_lacks(package: Path) -> None:
    prepare(package, RANGES)
    done = subprocess.run([sys.executable, "trt/build_trt.py"], cwd=package, capture_output=True, text=True)
    assert done.returncode != 0
    assert "tensorrt" in done.stderr + done.stdout
    assert done.stderr.endswith("build_decoder_prefill.py failed, for the reason above\n")
    assert not list(package.rglob("*.engine"))


def test_trtexec_has_the_same_profiles(package: Path) -> None:
    prepare(package, RANGES, options=Options(refit=True, weight_streaming=True))
    script = package / "trt" / "trtexec.sh"
    text = script.read_text()
    assert "--onnx=decoder_prefill.trt.onnx" in text
    assert "--onnx=embed_tokens.onnx" in text
    for words in ("--minShapes=x:1x2x8", "--optShapes=x:1x16x8", "--maxShapes=x:4x64x8", "--refit", "--stronglyTyped"):
        assert words in text
    assert "--allowWeightStreaming" in text
    subprocess.run(["sh", "-n", str(script)], check=True)


def test_without_polygraphy_the_status_says_so(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_polygraphy", lambda: False)
    monkeypatch.setattr(scripts, "has_polygraphy", lambda: False)
    status = prepare(package, RANGES)
    assert status.status == PREPARED
    assert status.missing[1] == "Polygraphy (pip install polygraphy), which writes build_trt.py"
    assert status.command == "sh trt/trtexec.sh"
    assert not list((package / "trt").glob("build_*"))
    with pytest.raises(BackendError, match="pip install polygraphy"):
        scripts.polygraphy_script(scripts.Job("a", "a.onnx", {}, False), Options(), package)


@polygraphy
@without_tensorrt
def test_a_build_that_fails_is_no_success(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT that seems to be there and is not: the scripts run, and their error is told."""
    monkeypatch.setattr(module, "importable", lambda: True)
    with pytest.raises(BackendError, match="TensorRT was not built, though everything for it is prepared"):
        prepare(package, RANGES)
    assert "build_decoder_prefill.py failed" in (package / "trt" / "build.log").read_text()
    assert json.loads((package / "trt" / "status.json").read_text())["status"] == PREPARED


@polygraphy
def test_built_means_that_every_engine_is_there(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With scripts that stand in for TensorRT: what is said about them, not what they do."""
    write = "open('trt/{}.engine', 'wb').write(b'stand-in')"
    monkeypatch.setattr(module, "importable", lambda: True)
    monkeypatch.setattr(module, "polygraphy_script", lambda job, options, folder: write.format(job.graph))
    status = prepare(package, RANGES)
    assert str(status) == "TensorRT: built trt/decoder_prefill.engine, trt/embed_tokens.engine"
    assert json.loads((package / "trt" / "status.json").read_text())["status"] == "built"
    monkeypatch.setattr(module, "polygraphy_script", lambda job, options, folder: "")
    with pytest.raises(BackendError, match=r"ended without trt/decoder_prefill.engine, trt/embed_tokens.engine"):
        prepare(package, RANGES)
    assert json.loads((package / "trt" / "status.json").read_text())["status"] == PREPARED


def test_a_placeholder_is_not_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", sys)
    assert not importable()


def test_a_graph_that_tensorrt_does_not_take_is_refused_before_anything_is_written(package: Path) -> None:
    nodes = [helper.make_node("TopK", ["x", "k"], ["y", "i"], "pick")]
    bad = model(nodes, {"x": (FLOAT, ["batch", "text_tokens"])}, ("y", "i"), {"k": np.array([4096])})
    (package / "vision_encoder.onnx").write_bytes(bad.SerializeToString())
    with pytest.raises(BackendError, match=r"vision_encoder: TopK 'pick': k is 4096.*\[TopK.k: "):
        prepare(package, RANGES)
    assert not (package / "trt").exists()
    assert not list(package.glob("*.trt.onnx"))


def test_the_largest_sizes_are_linted_too(package: Path) -> None:
    nodes = [helper.make_node("Shape", ["x"], ["k"], start=1), helper.make_node("TopK", ["x", "k"], ["y", "i"], "sort")]
    made = model(nodes, {"x": (FLOAT, ["batch", "text_tokens"])}, ("y", "i"))
    (package / "sorted.onnx").write_bytes(made.SerializeToString())
    prepare(package, RANGES)
    with pytest.raises(BackendError, match="sorted: TopK 'sort': k is 4096"):
        prepare(package, {**RANGES, "text_tokens": (1, 8, 4096)})


def test_it_can_be_prepared_again_and_keeps_timings(package: Path) -> None:
    prepare(package, RANGES)
    (package / "trt" / "timing.cache").write_bytes(b"timings")
    (package / "trt" / "old.engine").write_bytes(b"of other sizes")
    prepare(package, {**RANGES, "batch": (1, 2, 2)})
    assert (package / "trt" / "timing.cache").read_bytes() == b"timings"
    assert not (package / "trt" / "old.engine").exists()
    assert json.loads((package / "trt" / "profiles.json").read_text())["ranges"]["batch"] == [1, 2, 2]
    assert not list(package.glob(".*"))


def test_what_was_there_stays_when_writing_fails(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(package, RANGES)
    before = {p.name: p.read_bytes() for p in (package / "trt").iterdir()}

    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_whole", lambda path, content: None)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        prepare(package, {**RANGES, "batch": (1, 2, 2)})
    assert {p.name: p.read_bytes() for p in (package / "trt").iterdir()} == before
    assert not list(package.glob(".*"))


def spoil(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda package: (package / name).write_bytes(content)


HOSTILE: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickle": (spoil("embed_tokens.onnx", b"\x80\x04\x95cbuiltins\neval\n"), "embed_tokens.onnx is no ONNX model"),
    "empty": (spoil("embed_tokens.onnx", b""), "embed_tokens.onnx is no ONNX model"),
    "a graph that takes a script's name": (spoil("trt.onnx", ADD.SerializeToString()), "'trt' is no name"),
    "graph name": (spoil("a;rm -rf x.onnx", ADD.SerializeToString()), "'a;rm -rf x' is no name"),
    "input name": (
        spoil(
            "b.onnx",
            model([helper.make_node("Add", ["$(x)", "$(x)"], ["y"])], {"$(x)": (FLOAT, [1])}).SerializeToString(),
        ),
        r"'\$\(x\)' is no name",
    ),
    "link": (lambda package: (package / "c.onnx").symlink_to(package / "embed_tokens.onnx"), "c.onnx is a link"),
    "no graphs": (lambda package: [p.unlink() for p in package.glob("*.onnx")], "holds no ONNX graphs"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_packages_give_one_clear_error_and_no_files(package: Path, kind: str) -> None:
    make, message = HOSTILE[kind]
    make(package)
    with pytest.raises(ArtifactError, match=message):
        prepare(package, RANGES)
    assert not (package / "trt").exists()


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a folder"):
        prepare(tmp_path / "none", RANGES)


def test_references_must_fit_their_graph(package: Path) -> None:
    one = np.zeros(1, np.float32)
    with pytest.raises(ArtifactError, match="references are for other; the graphs are decoder_prefill, embed_tokens"):
        prepare(package, RANGES, {"other": ({}, {})})
    with pytest.raises(ArtifactError, match="references of embed_tokens must be for y"):
        prepare(package, RANGES, {"embed_tokens": ({"x": one}, {"z": one})})
    with pytest.raises(InputError, match="numbers are written only"):
        prepare(package, RANGES, {"embed_tokens": ({"x": np.array([object()])}, {"y": one})})


def polygraphy_run(package: Path, tolerance: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from polygraphy.tools import main; sys.exit(main())"
    words = ["run", "decoder_prefill.onnx", "--onnxrt", "--providers", "cpu"]
    words += ["--load-inputs", "in.json", "--load-outputs", "out.json"]
    words += ["--compare", "simple", "--atol", tolerance, "--rtol", tolerance]
    return subprocess.run([sys.executable, "-c", program, *words], cwd=package, capture_output=True, text=True)


@polygraphy
@pytest.mark.slow
def test_polygraphy_compares_onnx_runtime_with_saved_answers(
    package: Path, references: dict[str, tuple[Arrays, Arrays]]
) -> None:
    """The same answers up to 1e-6: they agree at 1e-4, and not at 1e-9, so the comparison does compare."""
    inputs, outputs = references["decoder_prefill"]
    noise = np.random.default_rng(2).uniform(-1e-6, 1e-6, outputs["y"].shape).astype(np.float32)
    (package / "in.json").write_bytes(inputs_json(inputs))
    (package / "out.json").write_bytes(outputs_json({**outputs, "y": outputs["y"] + noise}))
    close, exact = polygraphy_run(package, "1e-4"), polygraphy_run(package, "1e-9")
    assert close.returncode == 0, close.stdout + close.stderr
    assert "PASSED" in close.stdout
    assert exact.returncode != 0
    assert "FAILED" in exact.stdout
