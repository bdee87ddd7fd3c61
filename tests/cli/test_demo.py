"""`foveate demo` on a small untrained model; the bundled one runs in .ci/run, where there is time for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.cli import demo
from foveate.cli.models import load_model
from foveate.models import digits
from foveate.models.digits.architecture import DECODER_LAYERS
from foveate.passes import FastV, RandomPrune
from foveate.passes.pipeline import resolve
from foveate.report import compare
from tests.cli.conftest import Run

SMALL = {"cut-visual": "cut-visual{from_layer=1}", "fastv": "fastv{layer=1,keep=0.5}"}


@pytest.fixture
def small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(str(folder))
    monkeypatch.setattr(digits, "load", lambda: (loaded.model, loaded.get_processor()))
    monkeypatch.setattr(demo, "RECIPES", SMALL)
    monkeypatch.setattr(demo, "REPORTED", "cut-visual")
    monkeypatch.setattr(demo, "QUICK", (6, 1))
    monkeypatch.setattr(demo, "PROMPTS", 2)
    # The rows are made once, by the real thing; a second demo shows the same ones.
    real, made = compare.compare, []

    def once(*args: Any, **options: Any) -> list[compare.Row]:
        if not made:
            made.extend(real(*args, **options))
        return made

    monkeypatch.setattr(compare, "compare", once)


@pytest.mark.usefixtures("small")
@pytest.mark.slow
def test_the_whole_story(run: Run, tmp_path: Path) -> None:
    result = run("demo", "--quick", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.replace(str(tmp_path), "").splitlines())) <= 80
    told = json.loads((tmp_path / "out" / "foveate-demo.json").read_text())
    assert [row["name"] for row in told["table"]] == ["dense", *SMALL]
    dense, cut, fastv = told["table"]
    assert dense["flops"] > cut["flops"] and dense["flops"] > fastv["flops"]
    assert dense["predicted_s"] > cut["predicted_s"]
    assert dense["kv_bytes"] > fastv["kv_bytes"]
    assert all(row["n"] == 6 and row["prefill_s"] > 0 and row["decode_s"] > 0 for row in told["table"])
    assert len(told["answers"]) == 5
    for entry in told["answers"]:
        assert entry["question"] in result.stdout
        assert entry["right"] == (entry["answer"] == entry["truth"])
    assert told["kept"] == {"layer": 1, "kept": 72, "of": 144, "answer": told["kept"]["answer"]}
    assert (tmp_path / "out" / "report.txt").read_text() in result.stdout
    with Image.open(tmp_path / "out" / "kept-tokens.png") as picture:
        assert picture.width >= 480
    again = run("demo", "--quick", "-o", tmp_path / "out", "--json")
    assert again.exit_code == 0, again.stderr
    assert [row["name"] for row in json.loads(again.stdout)["table"]] == ["dense", *SMALL]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["foveate-demo.json", "kept-tokens.png", "report.txt"]


def test_a_folder_with_other_files_is_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    result = run("demo", "-o", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "holds other files" in result.stderr
    result = run("demo", "-o", tmp_path / "thesis.txt")
    assert "is a file" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_the_recipes_are_ones_that_the_bundled_model_can_take() -> None:
    for passes in demo.RECIPES.values():
        for each in resolve(passes):
            for option in ("layer", "from_layer"):
                assert getattr(each, option, 0) < DECODER_LAYERS
    (fastv,) = resolve(demo.RECIPES["fastv"])
    (random,) = resolve(demo.RECIPES["random-prune"])
    assert isinstance(fastv, FastV) and isinstance(random, RandomPrune)
    assert (fastv.layer, fastv.keep) == (random.layer, random.keep), "the two rows must compare"
    assert demo.REPORTED in demo.RECIPES and demo.PICTURED in demo.RECIPES
