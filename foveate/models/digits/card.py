"""Writes the model card and the example image that stand beside the weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from string import Template

from foveate.models.digits import Sample, samples
from foveate.models.digits.card_template import CARD
from foveate.models.digits.data import MOST_NON_DIGITS, digit_set
from foveate.models.digits.instruct import PLACE_LAYER, PLACE_WEIGHT
from foveate.models.digits.questions import EMPTY
from foveate.models.digits.schedule import Plan

EXAMPLE_SEED = 10
"""Seed of the held-out grid shown in the card."""


@dataclass(frozen=True)
class Results:
    """What a run made: parameters, bytes stored, seconds spent, and held-out accuracy per task (0..1)."""

    plan: Plan
    parameters: int
    size: int
    seconds: float
    accuracy: dict[str, float]


def example() -> Sample:
    """The held-out sample of the card and of the demo."""
    return samples(task="row", n=1, seed=EXAMPLE_SEED)[0]


def render(results: Results) -> str:
    """The model card in Markdown."""
    plan = results.plan
    table = "\n".join(f"| {task} | {share:.1%} | {plan.measure:,} |" for task, share in results.accuracy.items())
    lines = [["-" if cell == EMPTY else cell for cell in line] for line in example().grid]
    threads = {1: "one CPU core", 2: "two CPU cores", 4: "four CPU cores"}
    return Template(CARD).substitute(
        accuracy=table,
        batch=plan.batch,
        grid="\n".join(" ".join(line) for line in lines),
        heldout=len(digit_set("heldout").labels),
        machine=threads.get(plan.threads, f"{plan.threads} CPU cores"),
        minutes=f"{results.seconds / 60:.0f}",
        most_non_digits=MOST_NON_DIGITS,
        parameters=f"{results.parameters:,}",
        place_layer=PLACE_LAYER,
        place_weight=f"{PLACE_WEIGHT:g}",
        precision="bfloat16 autocast over float32 weights" if plan.half else "float32",
        rate=f"{plan.rate:g}",
        row_steps=f"{plan.row_steps:,}",
        seed=plan.seed,
        single_steps=f"{round(plan.steps * plan.single_share):,}",
        size=f"{results.size:,}",
        steps=f"{plan.steps:,}",
        tower_rate=f"{plan.tower_rate:g}",
        tower_steps=f"{plan.tower_steps:,}",
        train=f"{len(digit_set('train').labels):,}",
    )


def write_card(folder: Path, results: Results) -> None:
    """Writes `README.md` and `example.png` into `folder`."""
    example().image.convert("L").save(folder / "example.png", optimize=True)
    (folder / "README.md").write_text(render(results), encoding="utf-8")
