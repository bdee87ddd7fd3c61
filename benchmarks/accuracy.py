"""What each pass costs in accuracy at equal prefill FLOPs, on the bundled digits model; see README.md."""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate.evaluate import evaluate
from foveate.ir.program import Program
from foveate.machine import environment
from foveate.models import digits
from foveate.report.compare import batch_inputs, token_counts

TARGETS = (0.75, 0.5, 0.25)
"""Prefill FLOPs over the dense model's."""
TOLERANCE = 0.06
"""A target this far below a method's least share is out of its reach; cut-visual moves in steps of 0.1."""
NEAR = 0.03
"""A method whose least share is this near to a row that it already has gets no row for it."""
LAYERS = (1, 3)
"""Where fastv and random-prune choose: as early as fastv can, which reaches every target, and where it does better."""

FULL = {"lookup": 200, "row": 100, "count": 100}
QUICK = {"lookup": 8, "row": 4, "count": 4}
SEEDS = {"lookup": 8101, "row": 8102, "count": 8103}
TITLES = {"lookup": "look-up", "row": "rows", "count": "count"}
Z = 1.959964
"""Of a 95% interval."""
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Method:
    """One pass with one setting left open; the FLOPs grow with the setting."""

    name: str
    settings: str
    values: tuple[float, ...]

    def passes(self, value: float) -> str:
        """The pipeline at one value."""
        return f"{self.name}{{{self.settings.format(value)}}}"


@dataclass(frozen=True)
class Choice:
    """A row of the table: a pipeline and its share of the dense prefill's FLOPs; `missed`: targets below its reach."""

    name: str
    settings: str
    share: float
    least: float = 0.0
    missed: tuple[float, ...] = ()


Share = Callable[[float], float]
Value = tuple[float, tuple[float, ...]]
"""A setting, and the targets that are below the method's reach."""

PERCENTS = tuple(round(0.01 * step, 2) for step in range(1, 100))
METHODS = (
    Method("cut-visual", "from_layer={}", tuple(range(1, 10))),
    # Not keep=0: visual tokens that no head looks at are what cut-visual{from_layer=2} leaves.
    Method("drop-visual-heads", "keep={},from_layer=2", tuple(range(1, 8))),
    Method("drop-visual-neurons", "keep={}", PERCENTS),
    Method("drop-visual-neurons", "keep={},select=magnitude", PERCENTS),
    *(Method(name, f"layer={n},keep={{}}", PERCENTS) for n in LAYERS for name in ("fastv", "random-prune")),
)
TWINS = {"random-prune": "fastv"}
"""Methods that take another's values instead of looking for their own, so that the two compare."""
BLIND = Method("cut-visual", "from_layer={}", (0,))


def main() -> None:
    """Choose settings by cost, score them, write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few questions; needs -o")
    parser.add_argument("-o", "--output", type=Path, help=f"folder for the results (default: {RESULTS.name})")
    args = parser.parse_args()
    if args.quick and args.output is None:
        parser.error("--quick needs -o DIR: its figures mean nothing and must not replace the results")
    folder: Path = args.output or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    result = measure(QUICK if args.quick else FULL)
    table = markdown(result)
    replace(folder / "accuracy-digits.json", json.dumps(result, indent=2) + "\n")
    replace(folder / "accuracy-digits.md", table)
    print(table)


def measure(counts: dict[str, int]) -> dict[str, Any]:
    """All rows; the model is traced once."""
    model, processor = digits.load()
    program = foveate.trace(model)
    asked = {task: digits.samples(task=task, n=n, seed=SEEDS[task]) for task, n in counts.items()}
    dense = foveate.optimize(model, traced=program)
    text = token_counts(dense, batch_inputs(processor, asked["lookup"][:1]))["text_tokens"]
    rows = []
    for choice in choices(model, program, text):
        passes = f"{choice.name}{{{choice.settings}}}" if choice.settings else ""
        print(f"{passes or choice.name} ...", file=sys.stderr, flush=True)
        optimized = foveate.optimize(model, passes, traced=program)
        scores = {task: evaluate(optimized, processor, samples) for task, samples in asked.items()}
        rows.append(
            {
                "pass": choice.name,
                "settings": choice.settings,
                "prefill_flops_share": choice.share,
                "least_share": choice.least,
                "out_of_reach": choice.missed,
                "right": {task: sum(score.right) for task, score in scores.items()},
                "n": counts,
                "interval": {task: wilson(sum(score.right), len(score.right)) for task, score in scores.items()},
            }
        )
    about = {**environment(), "threads": torch.get_num_threads()}
    return {"model": "digits", "text_tokens": text, "seeds": SEEDS, "n": counts, "environment": about, "rows": rows}


def choices(model: Any, program: Program, text: int) -> list[Choice]:
    """The dense model, the blind one, and what each method comes to at each target."""

    def flops(passes: str) -> int:
        return foveate.cost(foveate.optimize(model, passes, traced=program).program, text_tokens=text).prefill.flops

    whole = flops("")
    blind = BLIND.passes(0)
    found = [Choice("dense", "", 1.0), Choice(BLIND.name, BLIND.settings.format(0), flops(blind) / whole)]
    chosen: dict[tuple[str, str], list[Value]] = {}
    for method in METHODS:
        print(f"choosing {method.name} ...", file=sys.stderr, flush=True)
        share = shares(method, lambda passes: flops(passes) / whole)
        twin = (TWINS.get(method.name, ""), method.settings)
        values = chosen[twin] if twin in chosen else settle(method.values, share)
        chosen[method.name, method.settings] = values
        least = share(method.values[0])
        found += [Choice(method.name, method.settings.format(v), share(v), least, missed) for v, missed in values]
    return found


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


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson's, which is fair near 0 and 1 too)."""
    p, spread = right / n, Z * Z / n
    middle = (p + spread / 2) / (1 + spread)
    half = Z * math.sqrt(p * (1 - p) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def markdown(result: dict[str, Any]) -> str:
    """The table, and what it was measured with."""
    about = result["environment"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("foveate", "torch", "transformers", "python"))
    asked = ", ".join(f"{n} {TITLES[task]}" for task, n in result["n"].items())
    seeds = ", ".join(str(result["seeds"][task]) for task in result["n"])
    lines = [
        "# Accuracy at equal FLOPs on digits",
        "",
        f"{versions}. Held-out questions: {asked} (seeds {seeds}). ±: half of a 95% interval, in points.",
        "",
        f"| pass | settings | prefill FLOPs | {' | '.join(TITLES.values())} |",
        "|---|---|--:|--:|--:|--:|",
        *(row(entry) for entry in result["rows"]),
        "",
        f"Prefill FLOPs: of the decoder, over dense, at 144 visual and {result['text_tokens']} text tokens. "
        "Settings were chosen by FLOPs alone, nearest to 75%, 50% and 25%.",
        "The model does not count (`1` every time would be right as often): judge by the other two columns.",
        "`cut-visual{from_layer=0}` is the model that never sees the image.",
        "",
    ]
    return "\n".join(lines)


def row(entry: dict[str, Any]) -> str:
    """One pipeline as a line of the table."""
    share = f"{entry['prefill_flops_share']:.0%}"
    if entry["out_of_reach"]:
        missed = " and ".join(f"{target:.0%}" for target in entry["out_of_reach"])
        share += f" ({missed} out of reach: at least {entry['least_share']:.0%})"
    scores = []
    for task, n in entry["n"].items():
        low, high = entry["interval"][task]
        scores.append(f"{entry['right'][task] / n:.1%} ±{50 * (high - low):.0f}")
    settings = f"`{entry['settings']}`" if entry["settings"] else ""
    return f"| {' | '.join([entry['pass'], settings, share, *scores])} |"


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    main()
