"""What pages show of benchmarks is what the benchmarks wrote."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from foveate.passes.pipeline import PASSES

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module of `benchmarks`, which finds its neighbours there while it is in use."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield import_module(name)
    for each in (name, "writing"):
        sys.modules.pop(each, None)


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmarks/accuracy_page.py`, which finds its neighbours as a script does."""
    yield from script("accuracy_page", monkeypatch)


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`benchmarks/selection_page.py`."""
    yield from script("selection_page", monkeypatch)


def test_the_accuracy_page_shows_the_committed_results(page: Any) -> None:
    result = json.loads((RESULTS / "accuracy-digits.json").read_text(encoding="utf-8"))
    assert (RESULTS / "accuracy-digits.md").read_text(encoding="utf-8") == page.markdown(result)
    shown = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert page.table(result) in shown
    assert "](accuracy.png)" in shown and (ROOT / "docs" / "accuracy.png").is_file()


def test_every_strategy_has_a_style_and_fewer_flops_than_dense(page: Any) -> None:
    rows = json.loads((RESULTS / "accuracy-digits.json").read_text(encoding="utf-8"))["rows"]
    names = {row["name"] for row in rows}
    assert names - {"no image"} == set(page.STYLES)
    assert all(row["prefill_flops_share"] < 1 for row in rows if row["name"] != "dense")


def test_the_page_of_selections_shows_the_committed_results(selections: Any) -> None:
    result = json.loads((RESULTS / "selection.json").read_text(encoding="utf-8"))
    assert (RESULTS / "selection.md").read_text(encoding="utf-8") == selections.markdown(result)
    assert selections.tables(result) in (ROOT / "docs" / "selection-results.md").read_text(encoding="utf-8")


def test_every_way_to_select_was_measured() -> None:
    result = json.loads((RESULTS / "selection.json").read_text(encoding="utf-8"))
    # `cut-visual` is the model without an image that the others stand beside.
    ways = {
        name
        for name, cls in PASSES.items()
        if cls.__module__.startswith(("foveate.passes.select", "foveate.passes.kv"))
    }
    on_digits = {row["passes"].partition("{")[0] for row in result["accuracy"]} - {"", "cut-visual"}
    assert on_digits == ways == {row["passes"].partition("{")[0] for row in result["time"]}
    assert all("prefill_time" in row and "selecting_time" in row for row in result["accuracy"] if row["passes"])
