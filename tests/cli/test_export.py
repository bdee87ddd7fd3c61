"""`foveate export`, and asking what it wrote."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from foveate import package
from foveate.cli import packaged
from foveate.errors import BackendError
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


@pytest.mark.slow
def test_a_package_that_disagrees_is_a_failed_gate(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "TOLERANCE", dict.fromkeys(package.TOLERANCE, -1.0))
    result = run("export", folder, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert "do not agree with torch" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_package_is_asked_quickly_with_the_same_words(
    run: Run, exported: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    ask = packaged.ask
    monkeypatch.setattr(packaged, "ask", lambda *given: asked.append(given[0]) or ask(*given))
    prompts = (("--image", image, "--prompt", "read row 2 ."), ("--prompt", "how many ?"))
    quick = [json.loads(run("run", exported, *prompt, "--json").stdout) for prompt in prompts]
    assert len(asked) == 2
    monkeypatch.setattr(packaged, "open_quickly", lambda *given: None)
    assert quick == [json.loads(run("run", exported, *prompt, "--json").stdout) for prompt in prompts]
    assert len(asked) == 2


def test_what_is_not_asked_quickly(exported: Path, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert packaged.open_quickly(str(exported), "onnx", True) is not None
    for name, backend in ((str(exported), "eager"), (str(saved), None), ("digits", None)):
        assert packaged.open_quickly(name, backend, True) is None

    def refuse(*given: object) -> None:
        raise BackendError("steps that evict keys")

    monkeypatch.setattr("foveate.runner.open_package", refuse)
    assert packaged.open_quickly(str(exported), None, True) is None


def test_what_the_ordinary_way_draws_is_drawn_of_a_package_too(
    run: Run, exported: Path, image: Path, tmp_path: Path
) -> None:
    drawn = tmp_path / "kept.png"
    result = run("run", exported, "--image", image, "--prompt", "read row 2 .", "--kept", drawn)
    assert result.exit_code == 0, result.stderr
    assert drawn.is_file()


def test_wrong_questions_are_one_line_each(run: Run, exported: Path, image: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    (copy / "decoder_step.onnx").write_bytes(b"other")
    for args, text in (
        ((exported, "--image", image, "--prompt", "<image> <image> 3"), "the prompt holds 2 <image> and 1 image was"),
        ((exported, "--prompt", "3 " * 1000), "this model takes 1024 in all"),
        ((copy, "--prompt", "3"), "decoder_step.onnx is not the file that was saved"),
    ):
        result = run("run", *args)
        assert (result.exit_code, result.stdout) == (2, "")
        (line,) = said_in(result)
        assert text in line


@pytest.mark.slow
def test_a_package_is_asked_without_torch(exported: Path, image: Path) -> None:
    code = (
        "import sys\nfrom foveate.cli.main import cli\ntry: cli(sys.argv[1:])\nfinally: print(sys.modules.get('torch'))"
    )
    args = ["run", str(exported), "--image", str(image), "--prompt", "read row 2 ."]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *_, last = done.stdout.splitlines()
    assert last == "None"
    assert done.stderr.startswith("before layer 1: 72 of 144 visual tokens stay")
