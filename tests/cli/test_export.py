"""`foveate export`, and asking what it wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foveate import package
from tests.cli.conftest import Run, said_in


@pytest.fixture(scope="module")
def exported(run: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "out"
    result = run("export", folder, "--passes", "fastv{layer=1,keep=0.5}", "-o", path, "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert said["folder"] == str(path) and said["processor"] and said["parity"]["ok"]
    assert sum(said["bytes"].values()) == sum((path / name).stat().st_size for name in said["bytes"])
    return path


@pytest.mark.slow
def test_a_package_is_asked_as_the_model_is(run: Run, folder: Path, exported: Path, image: Path) -> None:
    ask = ("--image", image, "--prompt", "read row 2 .", "--json")
    there = json.loads(run("run", exported, *ask).stdout)
    here = json.loads(run("run", folder, "--passes", "fastv{layer=1,keep=0.5}", *ask).stdout)
    assert (there.pop("backend"), here.pop("backend")) == ("onnx", "eager")
    assert there == here


def test_a_saved_folder_is_exported_without_passes(run: Run, saved: Path, tmp_path: Path) -> None:
    result = run("export", saved, "-o", tmp_path / "out", "--no-verify")
    assert result.exit_code == 0, result.stderr
    assert "times its weights\nnot checked against eager" in result.stdout
    again = run("export", saved, "-p", "fastv{layer=1,keep=0.5}", "-o", tmp_path / "other")
    assert again.exit_code == 2 and "leave --passes out" in again.stderr


def test_a_repository_for_triton_comes_with_the_package(run: Run, saved: Path, tmp_path: Path) -> None:
    result = run("export", saved, "-o", tmp_path / "out", "--no-verify", "--serving", "triton", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["serving"]["folder"] == "serving/triton"
    assert (tmp_path / "out" / "serving" / "triton" / "foveate" / "config.pbtxt").is_file()
    other = run("export", saved, "-o", tmp_path / "other", "--backend", "tensorrt", "--serving", "triton")
    assert other.exit_code == 2 and "over the backend onnx" in said_in(other)[-1]


def test_refusals_are_one_line_and_leave_nothing(run: Run, folder: Path, exported: Path, tmp_path: Path) -> None:
    for args, text in (
        (("export", folder, "-o", exported), "exists already"),
        (("export", folder, "-p", "nonsense", "-o", tmp_path / "a"), "nonsense"),
        (("export", tmp_path / "nowhere", "-o", tmp_path / "a"), "there is no folder"),
        (("export", folder, "-p", "sparsevlm{layers=[0],counts=rank,scale=0.5}", "-o", tmp_path / "a"), "sparsevlm"),
    ):
        result = run(*args)
        assert result.exit_code == 2, args
        (line,) = said_in(result)
        assert text in line
    assert not list(tmp_path.iterdir())


def test_a_package_that_disagrees_is_a_failed_gate(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "TOLERANCE", dict.fromkeys(package.TOLERANCE, -1.0))
    result = run("export", folder, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "do not agree with torch" in result.stderr
    assert not list(tmp_path.iterdir())
