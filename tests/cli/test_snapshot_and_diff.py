"""`foveate snapshot` and `foveate diff`, with gates for CI."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foveate.ir.snapshot import read_snapshot
from tests.cli.conftest import LAYERS, Run, said_in

CUT = "cut-visual{from_layer=1}"


@pytest.fixture(scope="module")
def files(run: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Snapshots of the model as it is, and after a cut."""
    place = tmp_path_factory.mktemp("snapshots")
    for name, passes in (("dense", ""), ("cut", CUT)):
        result = run("snapshot", folder, "--passes", passes, "--device", "cpu", "-o", place / f"{name}.json")
        assert result.exit_code == 0, result.stderr
        assert result.stdout.endswith(f"bytes in {place / name}.json\n")
    return place / "dense.json", place / "cut.json"


def test_the_file_is_what_stdout_would_be(run: Run, folder: Path, files: tuple[Path, Path]) -> None:
    result = run("snapshot", folder, "-p", CUT, "--device", "cpu")
    assert result.exit_code == 0
    assert result.stdout == files[1].read_text()
    data = read_snapshot(result.stdout).data
    assert data["model"]["name"] == str(folder)
    assert [record["text"] for record in data["passes"]] == [CUT]


@pytest.mark.slow
def test_json_says_what_was_written(run: Run, folder: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    sizes = ("--device", "h100", "--text-tokens", 30, "--batch", 2, "--dtype", "bfloat16", "--visual-tokens", 9)
    result = run("snapshot", folder, *sizes, "-o", path, "--json")
    told = json.loads(result.stdout)
    data = read_snapshot(path).data
    assert told == {"file": str(path), "bytes": path.stat().st_size, "layers": LAYERS, "cost": data["cost"]}
    expected = {"visual_tokens": 9, "text_tokens": 30, "batch": 2, "device": "h100", "dtype": "bfloat16"}
    assert expected.items() <= data["sizes"].items()
    to_stdout = json.loads(run("snapshot", folder, *sizes, "--json").stdout)
    assert to_stdout == {**told, "file": None}


def test_only_snapshots_are_replaced(run: Run, folder: Path, files: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(files[0].read_bytes())
    assert run("snapshot", folder, "-p", CUT, "--device", "cpu", "-o", path).exit_code == 0
    assert path.read_bytes() == files[1].read_bytes()
    path.write_text('{"model_type": "llava"}')
    result = run("snapshot", folder, "-o", path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "exists and is not replaced" in result.stderr and len(said_in(result)) == 1
    assert path.read_text() == '{"model_type": "llava"}'


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-o", "x.txt"), "must end in .json"),
        (("-o", "missing/x.json"), "there is no folder"),
        (("-p", "cut"), "there is no pass 'cut'"),
        (("--device", "abacus", "--text-tokens", "9"), "device 'abacus' is not known"),
        (("--layers", "3"), "--layers is a size of random:llava"),
        (("--text-tokens", "0"), "--text-tokens"),
    ],
)
def test_wrong_use_of_snapshot(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("snapshot", folder, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_diff_of_files(run: Run, files: tuple[Path, Path]) -> None:
    result = run("diff", *files)
    assert result.exit_code == 0
    assert "text sees text only  (cut-visual)" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "graphs are the same" in run("diff", files[0], files[0]).stdout


def test_json(run: Run, files: tuple[Path, Path]) -> None:
    told: dict[str, Any] = json.loads(run("diff", *files, "--json", "--fail-if", "prefill.flops>+1%").stdout)
    assert told["changed"] and set(told["graphs"]) == {"vision", "prefill", "decode"}
    assert told["cost"]["prefill.flops"]["change"] < 0
    assert [(g["gate"], g["ok"]) for g in told["gates"]] == [("prefill.flops>+1%", True)]
    assert json.loads(run("diff", *files, "--format", "json", "--fail-if", "prefill.flops>+1%").stdout) == told


def test_a_gate_that_fails_is_named_and_the_report_is_printed(run: Run, files: tuple[Path, Path]) -> None:
    gates = ("--fail-if", "prefill.flops<-1%", "--fail-if", "kv_bytes>1", "--fail-if", "decode.bytes>+1%")
    for options in ((), ("--json",), ("--format", "markdown"), ("--format", "html")):
        result = run("diff", *files, *gates, *options)
        assert result.exit_code == 1
        assert "prefill.flops" in result.stdout
        assert [line.split(": it is ")[0] for line in result.stderr.splitlines()] == [
            "gate failed: prefill.flops<-1%",
            "gate failed: kv_bytes>1",
        ]
    assert run("diff", *files, "--fail-if", "prefill.flops>+1%").exit_code == 0


@pytest.mark.parametrize(
    ("form", "start"), [("text", "A: "), ("markdown", "### "), ("json", "{"), ("html", "<!doctype html>")]
)
def test_formats_go_to_stdout_or_a_file(
    run: Run, files: tuple[Path, Path], tmp_path: Path, form: str, start: str
) -> None:
    shown = run("diff", *files, "--format", form).stdout
    assert shown.lower().startswith(start.lower())
    path = tmp_path / "report.out"
    result = run("diff", *files, "--format", form, "-o", path)
    assert result.stdout == f"written to {path}\n"
    assert path.read_text() == shown
    both = run("diff", *files, "--format", form, "-o", path, "--json")
    assert json.loads(both.stdout)["changed"]
    assert path.read_text() == shown


@pytest.mark.slow
def test_models_are_compared_at_the_sizes_of_a_snapshot(run: Run, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    run("snapshot", folder, "--device", "l4", "--text-tokens", 30, "--dtype", "float16", "-o", path)
    told = json.loads(run("diff", path, folder, "--json").stdout)
    assert (told["changed"], told["notes"]) == (False, [])
    assert all(entry["change"] == 0 for entry in told["cost"].values())
    told = json.loads(run("diff", path, folder, "--passes-b", CUT, "--batch", 2, "--json").stdout)
    assert told["changed"] and told["notes"] == ["costs are for different sizes: batch is 1 and 2"]
    assert told["b"]["passes"] == [CUT]


@pytest.mark.slow
def test_two_recipes_of_one_model(run: Run, folder: Path) -> None:
    result = run("diff", folder, folder, "--passes-a", CUT, "--passes-b", "fastv{layer=1,keep=0.5}", "--json")
    told = json.loads(result.stdout)
    assert (told["a"]["passes"], told["b"]["passes"]) == ([CUT], ["fastv{layer=1}"])
    assert told["changed"]


@pytest.mark.slow
def test_a_folder_saved_by_foveate(run: Run, folder: Path, saved: Path) -> None:
    told = json.loads(run("diff", folder, saved, "--passes-a", "fastv{layer=1,keep=0.5}", "--json").stdout)
    assert not told["changed"] and told["b"]["passes"] == ["fastv{layer=1}"]
    result = run("diff", folder, saved, "--passes-b", CUT)
    assert result.exit_code == 2 and "has its passes already" in result.stderr


def test_wrong_use_of_diff(run: Run, files: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    a, b = files
    broken = tmp_path / "broken.json"
    broken.write_bytes(a.read_bytes()[:5000])
    newer = tmp_path / "newer.json"
    newer.write_text(a.read_text().replace('"foveate_snapshot": 1', '"foveate_snapshot": 2'))
    for options, said in (
        ((a, b, "--fail-if", "prefill.flops"), "QUANTITY OP BOUND"),
        ((a, b, "--fail-if", "sparkle>1"), "no quantity 'sparkle'; there are: vision.flops"),
        ((a, b, "--passes-a", CUT), "is a snapshot and has its passes already; leave --passes-a out"),
        ((a, b, "--text-tokens", 9), "both are snapshots"),
        ((a, tmp_path / "missing.json"), "missing.json"),
        ((a, broken), "broken.json is not whole JSON"),
        ((newer, b), "newer.json was made by a newer foveate"),
        ((a, b, "-o", a), "is one of the two"),
        ((a, b, "-o", tmp_path / "no" / "x.md"), "there is no folder"),
        ((a, b, "--format", "html", "--json"), "give -o FILE"),
        ((a, b, "--format", "pdf"), "pdf"),
        ((a, folder, "--heads", 3), "--heads is a size of random:llava"),
        ((a,), "Missing argument 'B'"),
    ):
        result = run("diff", *options)
        assert (result.exit_code, result.stdout) == (2, ""), options
        assert said in result.stderr, options
        assert len(said_in(result)) == 1
    assert a.read_bytes().startswith(b"{")


def test_random_weights_of_any_size(run: Run) -> None:
    small = ("random:llava", "random:llava", "--layers", 2, "--hidden", 32, "--heads", 4, "--ffn", 48)
    result = run(
        "diff", *small, "--visual-tokens", 16, "--passes-b", "drop-visual-neurons{keep=0.5}", "--device", "cpu"
    )
    assert result.exit_code == 0, result.stderr
    assert "visual gate/up/down: 48 -> 24  (drop-visual-neurons)" in result.stdout


@pytest.mark.parametrize("form", ["text", "html", "json"])
def test_two_files_are_compared_without_waiting_for_torch(form: str) -> None:
    golden = Path(__file__).parents[1] / "golden" / "snapshots"
    files = [str(golden / f"llava-1.5-7b.{recipe}.json") for recipe in ("yopo-12", "yopo-25")]
    words = ["diff", *files, "--format", form]
    code = (
        "import sys\nfrom foveate.cli.main import cli\n"
        f"try: cli({words!r}, prog_name='foveate')\nexcept SystemExit as end: assert not end.code\n"
        "print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"
