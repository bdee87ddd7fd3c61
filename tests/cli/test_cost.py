"""`foveate cost` and `foveate bench --calibrate` as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

TINY = ["random:llava", "--layers", 3, "--hidden", 32, "--heads", 4, "--ffn", 48, "--visual-tokens", 16]
CUT = "cut-visual{from_layer=1}"


def told(run: Any, *words: Any) -> dict[str, Any]:
    result = run("cost", *words, "--json")
    assert result.exit_code == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_json_holds_the_contract(run: Any) -> None:
    found = told(run, *TINY, "-p", CUT, "--text-tokens", 10, "--batch", 2)
    assert (found["convention"], found["visual_tokens"], found["text_tokens"], found["batch"]) == ("actual", 16, 10, 2)
    for name in ("dense", "optimized"):
        assert {"vision", "prefill", "decode", "kv_bytes", "peak_bytes"} <= set(found[name])
        assert {"flops", "bytes", "time_s"} <= set(found[name]["prefill"])
    assert found["speedup"]["prefill_flops"] > 1
    assert found["speedup"]["prefill_time"] > 1
    assert found["passes"] == CUT


def test_recipes_stand_beside_the_dense_model(run: Any) -> None:
    result = run("cost", *TINY, "-p", CUT, "-p", "recipe:yopo-25", "--breakdown", "stream")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert f"A: {CUT}" in lines
    assert "B: recipe:yopo-25" in lines
    assert max(map(len, lines)) <= 80
    assert {line.split()[0] for line in lines if line.strip()} >= {"dense", "A", "B", "model", "prefill"}


@pytest.mark.slow
@pytest.mark.parametrize("by", ["layer", "role", "stream"])
def test_a_breakdown_has_every_part(run: Any, by: str) -> None:
    found = told(run, *TINY, "-p", CUT, "--breakdown", by)
    assert [entry["passes"] for entry in found["breakdown"]] == ["", CUT]
    for entry, spent in zip(found["breakdown"], (found["dense"], found["optimized"])):
        parts = entry["prefill"]
        assert all(by in part for part in parts)
        assert sum(part["time_s"] for part in parts) == pytest.approx(spent["prefill"]["time_s"])


@pytest.mark.slow
def test_conventions_and_modules(run: Any) -> None:
    found = told(run, *TINY, "-p", "", "--convention", "lvpruning", "--modules", "1,2")
    assert found["optimized"]["prefill"]["flops"] > found["dense"]["prefill"]["flops"]
    result = run("cost", *TINY, "--convention", "llm-viewer", "-p", CUT)
    assert "as llm-viewer counts, dense: 0.0000 TFLOPs" in result.stdout
    assert "GB moved" in result.stdout


@pytest.mark.slow
def test_number_formats(run: Any) -> None:
    wide, narrow = (told(run, *TINY, *words)["dense"] for words in ((), ("--dtype", "int8", "--kv-bits", "4")))
    assert wide["kv_bytes"] == 8 * narrow["kv_bytes"]


@pytest.mark.slow
def test_a_saved_folder_is_set_beside_the_model_it_was_made_from(run: Any, folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    assert run("optimize", folder, "-p", CUT, "-o", saved).exit_code == 0
    a, b = told(run, saved), told(run, folder, "-p", CUT)
    assert a["dense"] == b["dense"]
    assert a["optimized"] == b["optimized"]
    assert a["passes"] == CUT
    result = run("cost", saved, "-p", CUT)
    assert result.exit_code == 2
    assert "leave --passes out" in result.stderr


@pytest.mark.slow
def test_a_folder_needs_no_weights(run: Any, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    assert told(run, tmp_path, "-p", CUT)["dense"] == told(run, folder, "-p", CUT)["dense"]


@pytest.mark.slow
def test_a_calibrated_device_is_one_to_forecast_for(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate import machine

    measure = machine.calibrate
    monkeypatch.setattr(machine, "calibrate", lambda seconds: measure(32, 32, 32, seconds=0.02))
    path = tmp_path / "here.yaml"
    result = run("bench", "--calibrate", path, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["device"]["flops_per_s"]["float32"] > 0
    assert len(yaml.safe_load(path.read_text())) == 1
    assert told(run, *TINY, "--device", path)["dense"]["prefill"]["time_s"] > 0
    assert "foveate cost MODEL --device" in run("bench", "--calibrate", path).stdout


@pytest.mark.slow
def test_a_plot(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "out.png"
    result = run("cost", *TINY, "-p", CUT, "--plot", path)
    assert result.exit_code == 0, result.stderr
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_plot_without_matplotlib_is_refused_before_the_work(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from foveate.report import plot

    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    result = run("cost", *TINY, "--plot", tmp_path / "out.png")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "foveate[plot]" in result.stderr


def test_a_gain_that_is_none_is_told(run: Any) -> None:
    result = run("cost", *TINY, "-p", "random-prune{layer=2,keep=0.9}")
    assert result.exit_code == 0
    assert "WARNING: A: predicted" in result.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["llava-9"], "there is no model llava-9; MODEL is digits, random:llava, gemma-3-4b"),
        ([*TINY, "--device", "abacus"], "device 'abacus' is not known"),
        ([*TINY, "--device", "no.yaml"], "no.yaml cannot be read"),
        ([*TINY, "--modules", "1,x"], "layer numbers with commas between"),
        ([*TINY, "--modules", "1", "-p", ""], "by the convention lvpruning only"),
        ([*TINY, "--modules", "1", "--convention", "lvpruning"], "--modules are counted in recipes"),
        ([*TINY, "--plot", "out.jpg"], "must end in .png"),
        ([*TINY, "--plot", "nowhere/out.png"], "there is no folder"),
        ([*TINY, "-p", "cut-visual{from_layer=9}"], "from_layer=9 is not a layer of this model"),
        ([*TINY, "-p", "{"], "expected the name of a pass"),
        ([*TINY, "--batch", "0"], "0 is not in the range x>=1"),
        (["llava-1.5-7b", "--layers", "3"], "--layers is a size of random:llava; llava-1.5-7b has its own"),
    ],
)
def test_wrong_use_is_one_line(run: Any, words: list[Any], said: str) -> None:
    result = run("cost", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    *progress, error = result.stderr.strip().splitlines()
    assert said in error
    assert all(line.endswith(" ...") for line in progress)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--calibrate", "d.json"], "must end in .yaml"),
        (["digits", "--calibrate", "d.yaml"], "leave MODEL and --passes out"),
        (["digits"], "give MODEL and --passes"),
    ],
)
def test_wrong_use_of_bench(run: Any, words: list[Any], said: str) -> None:
    result = run("bench", *words)
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.slow
def test_a_shipped_configuration_needs_no_weights(run: Any) -> None:
    found = told(run, "LLaVA-1.5-7B", "-p", "recipe:yopo-25", "--device", "h200", "--convention", "yopo")
    assert round(found["dense"]["prefill"]["flops"] / 1e12, 2) == 7.63
    assert round(found["optimized"]["prefill"]["flops"] / 1e12, 2) == 1.91
