"""What each strategy costs in accuracy at equal prefill FLOPs, before and after a short fine-tune; see README.md."""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy_page import markdown, write
from writing import RESULTS, needs, replace

import foveate
from foveate.cli.data import DigitExamples
from foveate.evaluate import evaluate
from foveate.ir.program import Program
from foveate.machine import environment
from foveate.models import digits
from foveate.report.compare import batch_inputs, token_counts
from foveate.train import Settings, finetune

TARGETS = (0.75, 0.5, 0.25)
"""Prefill FLOPs over the dense model's."""
TOLERANCE = 0.06
"""A target this far below a method's least share is out of its reach; cut-visual moves in steps of 0.1."""
NEAR = 0.03
"""A method whose least share is this near to a row that it already has gets no row for it."""
LAYERS = (1, 3)
"""Where fastv and random-prune choose: as early as fastv can, which reaches every target, and where it does better."""

FULL = {"questions": {"lookup": 200, "row": 100, "count": 100}, "steps": 150, "batch": 16}
QUICK = {"questions": {"lookup": 8, "row": 4, "count": 4}, "steps": 2, "batch": 4}
SEEDS = {"lookup": 8101, "row": 8102, "count": 8103}
WEIGHTS = {"rate": 1e-3}
LORA = {"rate": 3e-3, "lora_rank": 16}
WITH_LORA = "cut-visual{from_layer=3}"
"""The row that is trained with adapters too."""


@dataclass(frozen=True)
class Method:
    """A pipeline with one setting left open, where `@` stands; the FLOPs grow with the setting."""

    name: str
    template: str
    values: tuple[float, ...]

    def passes(self, value: float) -> str:
        """The pipeline at one value."""
        return self.template.replace("@", str(value))


@dataclass(frozen=True)
class Choice:
    """A row of the table: a pipeline and its share of the dense prefill's FLOPs; `missed`: targets below its reach."""

    name: str
    passes: str
    share: float
    least: float = 0.0
    missed: tuple[float, ...] = ()


Share = Callable[[float], float]
Value = tuple[float, tuple[float, ...]]
"""A setting, and the targets that are below the method's reach."""

PERCENTS = tuple(round(0.01 * step, 2) for step in range(1, 100))
YOPO = "neighbor-attention{radius=2},drop-visual-heads{keep=4,from_layer=2},drop-visual-neurons{keep=0.5}"
METHODS = (
    Method("cut-visual", "cut-visual{from_layer=@}", tuple(range(1, 10))),
    # Not keep=0: visual tokens that no head looks at are what cut-visual{from_layer=2} leaves.
    Method("drop-visual-heads", "drop-visual-heads{keep=@,from_layer=2}", tuple(range(1, 8))),
    Method("drop-visual-neurons", "drop-visual-neurons{keep=@}", PERCENTS),
    Method("neighbor-attention", "neighbor-attention{radius=@}", (2,)),
    Method("neighbor-attention", "neighbor-attention{radius=@}", (1,)),
    Method("all four", YOPO + ",cut-visual{from_layer=@}", tuple(range(1, 10))),
    *(
        Method(f"{name}, layer {n}", f"{name}{{layer={n},keep=@}}", PERCENTS)
        for n in LAYERS
        for name in ("fastv", "random-prune")
    ),
)
TWINS = {f"random-prune, layer {n}": f"fastv, layer {n}" for n in LAYERS}
"""Methods that take another's values instead of looking for their own, so that the two compare."""
BLIND = "cut-visual{from_layer=0}"


def main() -> None:
    """Choose settings by cost; ask, train and ask again; write JSON after every row, Markdown and a picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few questions, two steps; needs -o")
    parser.add_argument("--jobs", type=int, default=2, help="rows at once, one thread each (default: 2)")
    parser.add_argument("-o", "--output", type=Path, help=f"folder for the results (default: {RESULTS.name})")
    args = parser.parse_args()
    needs(parser, "accelerate", "peft", "matplotlib")
    if args.quick and args.output is None:
        parser.error("--quick needs -o DIR: its figures mean nothing and must not replace the results")
    folder: Path = args.output or RESULTS
    size: dict[str, Any] = QUICK if args.quick else FULL
    model, processor = digits.load()
    drawn = digits.samples(task="lookup", n=1, seed=SEEDS["lookup"])
    text = token_counts(foveate.optimize(model), batch_inputs(processor, drawn))["text_tokens"]
    found = list(choices(model, foveate.trace(model), text))
    work = [(choice, WEIGHTS, size) for choice in found]
    work += [(choice, LORA, size) for choice in found if choice.passes == WITH_LORA]
    about = {**environment(), "threads": 1, "jobs": args.jobs}
    result = {"model": "digits", "text_tokens": text, "seeds": SEEDS, **size, "environment": about, "rows": []}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for row in pool.map(measure, *zip(*work, strict=True)):
            print(f"{row['passes'] or 'dense'}: {row['right']} -> {row['right_trained']}", file=sys.stderr, flush=True)
            result["rows"].append(row)
            replace(folder / "accuracy-digits.json", json.dumps(result, indent=2) + "\n")
    write(result, folder)
    print(markdown(result))


def measure(choice: Choice, how: dict[str, Any], size: dict[str, Any]) -> dict[str, Any]:
    """One row: right answers before and after training."""
    # A model of its own, because training changes the weights that an optimized model shares.
    model, processor = digits.load()
    optimized = foveate.optimize(model, choice.passes)
    asked = {task: digits.samples(task=task, n=n, seed=SEEDS[task]) for task, n in size["questions"].items()}

    def ask() -> dict[str, int]:
        return {task: sum(evaluate(optimized, processor, samples).right) for task, samples in asked.items()}

    before = ask()
    settings = Settings(steps=size["steps"], batch=size["batch"], **how)
    examples = DigitExamples(size["steps"] * size["batch"], settings.seed)
    with tempfile.TemporaryDirectory() as folder:
        run = finetune(optimized, processor, examples, settings, Path(folder))
    return {
        "name": choice.name,
        "passes": choice.passes,
        "prefill_flops_share": choice.share,
        "least_share": choice.least,
        "out_of_reach": choice.missed,
        "right": before,
        "right_trained": ask(),
        "training": {**how, **run.to_json()},
    }


def choices(model: Any, program: Program, text: int) -> Iterator[Choice]:
    """The dense model, the blind one, and what each method comes to at each target."""

    def flops(passes: str) -> int:
        return foveate.cost(foveate.optimize(model, passes, traced=program).program, text_tokens=text).prefill.flops

    whole = flops("")
    yield Choice("dense", "", 1.0)
    yield Choice("no image", BLIND, flops(BLIND) / whole)
    chosen: dict[str, list[Value]] = {}
    for method in METHODS:
        print(f"choosing {method.name} ...", file=sys.stderr, flush=True)
        share = shares(method, lambda passes: flops(passes) / whole)
        values = chosen.get(TWINS.get(method.name, "")) or settle(method.values, share)
        chosen[method.name] = values
        for value, missed in values:
            yield Choice(method.name, method.passes(value), share(value), share(method.values[0]), missed)


def shares(method: Method, of: Callable[[str], float]) -> Share:
    """FLOP shares by value, each asked for once."""
    return functools.cache(lambda value: of(method.passes(value)))


def settle(values: Sequence[float], share: Share) -> list[Value]:
    """For each target the value nearest to it; for targets below the least share that value once, and which."""
    least = share(values[0])
    missed = tuple(target for target in TARGETS if least > target + TOLERANCE)
    found = [nearest(values, share, target) for target in TARGETS if target not in missed]
    if missed and (not found or share(found[-1]) - least > NEAR):
        found.append(values[0])
    unique = list(dict.fromkeys(found))
    return [(value, missed if value == unique[-1] else ()) for value in unique]


def nearest(values: Sequence[float], share: Share, target: float) -> float:
    """The value whose share is nearest to the target, by bisection: the shares grow with the values."""
    low, high = 0, len(values) - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if share(values[middle]) < target else (low, middle)
    return min(values[low], values[high], key=lambda value: abs(share(value) - target))


if __name__ == "__main__":
    main()
