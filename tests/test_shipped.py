"""Shipped recipes on shipped configurations against committed snapshots: what a change does to them must be meant.

FOVEATE_UPDATE_GOLDEN=1 writes the snapshots anew; read the git diff before committing it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import foveate
from foveate.errors import PassError
from foveate.ir.program import Program
from foveate.ir.snapshot import read_snapshot
from foveate.ir.snapshot.make import snapshot
from foveate.models import configs, digits
from foveate.models.registry import trace_program
from foveate.passes.pipeline import apply_pipeline, recipe_models, recipes
from tests.models.tiny import gemma3
from tests.shipped import with_passes

GOLDEN = Path(__file__).parent / "golden" / "snapshots"
DIGITS = "digits-yopo"
CASES = [
    (name, recipe)
    for recipe in recipes()
    if recipe != DIGITS
    for name in recipe_models(recipe) or configs.names()
    if (name, recipe) != ("gemma-3-4b", "fastv-50")
]
GEMMA = ("small-gemma3", "fastv-2")
"""Layers of two kinds in turn make large snapshots; one that sees all tokens must rank."""
MOST_BYTES = 300_000
"""Of a model with 32 layers; deeper ones may be larger in proportion."""


def check(name: str, recipe: str, make: Callable[[], Program], device: str) -> None:
    made = snapshot(make(), name=name, device=device)
    path = GOLDEN / f"{name}.{recipe}.json"
    assert len(made.to_text()) < MOST_BYTES * max(1, made.data["model"]["layers"] / 32)
    if os.environ.get("FOVEATE_UPDATE_GOLDEN"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(made.to_text(), encoding="utf-8")
    golden = read_snapshot(path)
    if made.to_text() == golden.to_text():
        return
    found = foveate.diff(golden, made)
    if made.data["versions"] != golden.data["versions"] and found.changed:
        pytest.skip(f"snapshots are of {golden.data['versions']}, this is {made.data['versions']}")
    assert not found.changed, f"{path.name} is no longer what the recipe gives:\n{found.to_text()}"
    same = {**made.data, "versions": golden.data["versions"]}
    assert same == golden.data, f"{path.name}: the graphs are the same, but what is said of them is not"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "recipe"), CASES)
def test_shipped_recipes_give_their_snapshots(name: str, recipe: str) -> None:
    check(name, recipe, lambda: with_passes(name, f"recipe:{recipe}"), "h100")


@pytest.mark.slow
def test_the_recipe_that_ranks_by_a_layer_with_a_window_is_refused() -> None:
    message = r"fastv: in layer 1 a token sees only the last 1024 tokens, .* in the layers 5, 11, 17, 23, 29$"
    with pytest.raises(PassError, match=message):
        with_passes("gemma-3-4b", "recipe:fastv-50")


def test_a_small_model_of_that_family_gives_its_snapshot() -> None:
    source = gemma3("meta", kinds="sliding full sliding full", num_hidden_layers=4)
    check(*GEMMA, lambda: apply_pipeline(trace_program(source), "fastv{layer=2,keep=0.5}"), "h100")


def test_the_recipe_of_digits_gives_its_snapshot() -> None:
    check("digits", DIGITS, lambda: apply_pipeline(trace_program(digits.load()[0]), f"recipe:{DIGITS}"), "cpu")


def test_no_snapshot_is_left_of_a_recipe_that_is_gone() -> None:
    names = {f"{name}.{recipe}.json" for name, recipe in [*CASES, GEMMA, ("digits", DIGITS)]}
    assert {path.name for path in GOLDEN.iterdir()} == names


def test_the_docs_say_what_the_snapshots_say() -> None:
    page = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\S+)` \| (\S+) \| \d+% \| (\S+)% \| (\S+)x \|$", page, re.MULTILINE)
    assert {(name, recipe) for recipe, name, _, _ in rows} == {c for c in CASES if c[1] != "fastv-50"}
    for recipe, name, counted, predicted in rows:
        records = [r["cost"] for r in read_snapshot(GOLDEN / f"{name}.{recipe}.json").data["passes"] if r["cost"]]
        flops, seconds = (records[-1][key][1] / records[0][key][0] for key in ("prefill_flops", "prefill_s"))
        assert (counted, predicted) == (f"{100 * flops:.1f}", f"{1 / seconds:.2f}"), (recipe, name)
