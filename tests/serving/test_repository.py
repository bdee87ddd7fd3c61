"""Triton model repositories: whole, linked to the package, and held to schema, graphs and hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import foveate
from foveate.errors import ArtifactError, BackendError
from foveate.model import OptimizedModel
from foveate.models.random import random_llava
from foveate.serving.triton import check
from foveate.serving.triton.files import FOLDER

MODELS = ("decoder_prefill", "decoder_step", "embed_tokens", "foveate", "foveate_stream", "vision_encoder")


@pytest.fixture(scope="module")
def model() -> OptimizedModel:
    return foveate.optimize(random_llava(layers=2), "fastv{layer=1,keep=0.5}")


@pytest.fixture(scope="module")
def whole(model: OptimizedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package") / "out"
    found = foveate.export(model, output=folder, verify=False, serving="triton")
    assert found.serving.models == MODELS
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_graphs_and_weights_are_hard_links(whole: Path) -> None:
    for name in MODELS[:3]:
        version = whole / FOLDER / name / "1"
        assert (version / "model.onnx").samefile(whole / f"{name}.onnx")
        assert (version / "model.safetensors").samefile(whole / "model.safetensors")


def test_a_file_system_without_links_gets_copies(
    model: OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    found = foveate.export(model, output=tmp_path / "out", verify=False, serving="triton").serving
    weights = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert found.linked == 0 and found.bytes > 4 * weights
    check(tmp_path / "out")


def test_a_package_with_a_repository_loads_and_says_what_it_holds(whole: Path) -> None:
    assert foveate.load(whole).backend == "onnx"
    listed = json.loads((whole / "foveate.json").read_text())["serving"]
    there = {p.relative_to(whole).as_posix() for p in (whole / "serving").rglob("*") if p.is_file()}
    assert listed.keys() == there


def test_what_the_command_says_counts_links_once(model: OptimizedModel, tmp_path: Path) -> None:
    found = foveate.export(model, output=tmp_path / "out", verify=False, serving="triton")
    assert not any(name.startswith("serving") for name in found.bytes)
    assert found.serving.bytes < 50_000 < found.serving.linked
    said = json.loads(json.dumps(found.to_json()))["serving"]
    assert said["models"] == list(MODELS) and "6 models in serving/triton" in str(found)


def test_configurations_hold_to_tritons_schema(whole: Path) -> None:
    pytest.importorskip("tritonclient.grpc", reason="Triton's schema comes with tritonclient")
    assert check(whole)


def test_without_tritonclient_it_is_written_and_said_not_to_be_checked(
    model: OptimizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tritonclient.grpc.model_config_pb2", None)
    found = foveate.export(model, output=tmp_path / "out", verify=False, serving="triton")
    assert not found.serving.checked and "NOT CHECKED: pip install" in str(found)
    assert not check(tmp_path / "out")


STEP = "decoder_step/config.pbtxt"
LINE = '  { name: "order" data_type: TYPE_INT64 dims: [ -1, -1 ] },\n'


@pytest.mark.parametrize(
    ("file", "old", "new", "reason"),
    [
        (STEP, LINE, "", "order stands there 0 times"),
        (STEP, LINE, LINE * 2, "order stands there 2 times"),
        (STEP, LINE, LINE.replace("order", "ordre") + LINE, "the graph has no ordre"),
        (STEP, LINE, LINE.replace("INT64", "INT32"), "TYPE_INT32 dims: .* should be .* TYPE_INT64"),
        (STEP, LINE, LINE.replace("[ -1, -1 ]", "[ -1, 1 ]"), r"dims: \[ -1, 1 \] .* should be .* \[ -1, -1 \]"),
        (STEP, LINE, LINE.replace("[ -1, -1 ]", "[ -1 ]"), "should be"),
        (STEP, 'name: "new.0.key"', 'name: "new.0.yek"', "new.0.key stands there 0 times"),
        (STEP, 'name: "decoder_step"', 'name: "decoder"', "must be that of its folder"),
        (STEP, "max_batch_size: 0", "max_batch: 0", "no configuration of Triton's"),
        ("foveate/config.pbtxt", "past_order", "order_past", "does not list the tensors of the graphs"),
    ],
)
def test_a_wrong_configuration_is_found(copy: Path, file: str, old: str, new: str, reason: str) -> None:
    pytest.importorskip("tritonclient.grpc", reason="Triton's schema comes with tritonclient")
    path = copy / FOLDER / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    manifest = json.loads((copy / "foveate.json").read_text())
    manifest["serving"][f"{FOLDER}/{file}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (copy / "foveate.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=reason):
        check(copy)


@pytest.mark.parametrize("damage", ["changed", "missing", "link", "stray"])
def test_files_are_those_that_were_written(copy: Path, damage: str) -> None:
    path = copy / FOLDER / "foveate" / "1" / "model.py"
    if damage == "changed":
        path.write_text(path.read_text() + "print('planted')\n")
    elif damage == "stray":
        path = copy / FOLDER / "other" / "1" / "model.py"
        path.parent.mkdir(parents=True)
        path.write_text("print('planted')\n")
    else:
        path.unlink()
        if damage == "link":
            path.symlink_to(Path(__file__))
    with pytest.raises(ArtifactError, match=r"model.py"):
        check(copy)


def test_the_folder_itself_is_no_link(copy: Path, tmp_path: Path) -> None:
    (copy / "serving").rename(tmp_path / "elsewhere")
    (copy / "serving").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match="serving is a link"):
        check(copy)


def test_a_package_without_a_repository_says_so(model: OptimizedModel, tmp_path: Path) -> None:
    foveate.export(model, output=tmp_path / "out", verify=False)
    with pytest.raises(ArtifactError, match="export it with --serving triton"):
        check(tmp_path / "out")


@pytest.mark.slow
def test_what_triton_cannot_run_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    heavy = foveate.optimize(random_llava(layers=1), "heavy-recent{heavy=4,recent=4}")
    half = foveate.optimize(random_llava(layers=1, dtype=torch.bfloat16))
    for model, options, reason in (
        (heavy, {}, "heavy-recent evicts keys"),
        (half, {}, "bfloat16, which Triton's Python models cannot read"),
        (half, {"backend": "tensorrt"}, "over the backend onnx; not triton over tensorrt"),
        (half, {"serving": "seldon"}, "there is triton"),
    ):
        with pytest.raises(BackendError, match=reason):
            foveate.export(model, output=tmp_path / "out", verify=False, **{"serving": "triton", **options})
    assert not list(tmp_path.iterdir())
