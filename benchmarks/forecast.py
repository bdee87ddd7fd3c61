"""Predicted against measured prefill speed-up on this machine: one calibration, several models and recipes.

python benchmarks/forecast.py            measures, writes results/forecast-cpu.json and .md
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from writing import RESULTS, replace

import foveate
from foveate.bench import measure
from foveate.ir.cost import cost_of
from foveate.ir.cost.devices import Device
from foveate.machine import calibrate, environment, thread_count
from foveate.models import digits
from foveate.models.random import random_inputs, random_llava
from foveate.report.compare import batch_inputs, token_counts
from foveate.report.figures import percent, times

TEXT = 64
MODELS: dict[str, dict[str, Any]] = {
    "12 layers, 1024 wide, 576 tokens": {"layers": 12, "hidden": 1024, "heads": 16, "ffn": 2816, "visual_tokens": 576},
    "6 layers, 2048 wide, 576 tokens": {"layers": 6, "hidden": 2048, "heads": 16, "ffn": 5504, "visual_tokens": 576},
    "16 layers, 512 wide, 256 tokens": {"layers": 16, "hidden": 512, "heads": 8, "ffn": 1408, "visual_tokens": 256},
    "8 layers, 768 wide, 1024 tokens": {"layers": 8, "hidden": 768, "heads": 12, "ffn": 2048, "visual_tokens": 1024},
}
RECIPES = (
    "cut-visual{from_layer=0.5}",
    "fastv{layer=2,keep=0.25}",
    "drop-visual-neurons{keep=0.25}",
    "drop-visual-heads{keep=0.5,from_layer=0},drop-visual-neurons{keep=0.5},cut-visual{from_layer=0.5}",
)


def measured(model: Any, inputs: Any, sizes: dict[str, Any], device: Device, repeat: int) -> list[dict[str, Any]]:
    """A row for each recipe on one model, all timed in turn in one process."""
    program = foveate.trace(model)
    contenders = {name: foveate.optimize(model, name, traced=program) for name in ("", *RECIPES)}
    with torch.inference_mode():
        timing = measure(contenders, inputs, repeat, 1)
    costs = {name: cost_of(opt.program, **sizes, device=device) for name, opt in contenders.items()}
    return [
        {
            "passes": name,
            "flops": costs[""].first_token_flops / costs[name].first_token_flops,
            "predicted": costs[""].first_token_s / costs[name].first_token_s,
            "measured": timing[""].prefill_s / timing[name].prefill_s,
            "dense_s": timing[""].prefill_s,
            "dense_predicted_s": costs[""].first_token_s,
        }
        for name in RECIPES
    ]


def run(threads: int, repeat: int) -> dict[str, Any]:
    """All models; the device is measured once, before them."""
    rows: list[dict[str, Any]] = []
    with thread_count(threads):
        device = calibrate(seconds=8)
        tower: dict[str, Any] = {"vision_layers": 2, "vision_hidden": 32, "vision_heads": 2}
        for name, shape in MODELS.items():
            model = random_llava(**shape, **tower)
            inputs: Any = random_inputs(model, text_tokens=TEXT)
            rows += [
                {"model": name, **row}
                for row in measured(model, inputs, {"text_tokens": TEXT, "prefix_tokens": 3}, device, repeat)
            ]
            print(name, file=sys.stderr)
        model, processor = digits.load()
        inputs = batch_inputs(processor, digits.samples(task="lookup", n=8, seed=3))
        rows += [
            {"model": "digits, 8 prompts", **row}
            for row in measured(model, inputs, token_counts_of(model, inputs), device, repeat)
        ]
    errors = [abs(row["predicted"] / row["measured"] - 1) for row in rows]
    return {
        "device": asdict(device) | {"flops_per_s": dict(device.flops_per_s)},
        "threads": threads,
        "repeat": repeat,
        "environment": environment(),
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "flops_median_error": statistics.median(abs(row["flops"] / row["measured"] - 1) for row in rows),
        "rows": rows,
    }


def token_counts_of(model: Any, inputs: Any) -> dict[str, int]:
    """Sizes of the batch."""
    return token_counts(foveate.optimize(model), inputs)


def to_markdown(result: dict[str, Any]) -> str:
    """The table that the docs show."""
    about = result["environment"]
    lines = [
        f"# Predicted against measured prefill speed-up ({len(result['rows'])} pairs)",
        "",
        f"`python benchmarks/forecast.py`: {about['cpu']}, threads {result['threads']}, torch {about['torch']}, "
        f"fp32, eager, medians of {result['repeat']} rounds. Median error {percent(result['median_error'])}, worst "
        f"{percent(result['worst_error'])}; taking the FLOP ratio for the speed-up would be off by "
        f"{percent(result['flops_median_error'])} in the median.",
        "",
        "| model | passes | FLOPs | predicted | measured | error |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        error = row["predicted"] / row["measured"] - 1
        lines.append(
            f"| {row['model']} | `{row['passes']}` | {times(row['flops'])} | {times(row['predicted'])} | "
            f"{times(row['measured'])} | {100 * error:+.0f}% |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS / "forecast-cpu")
    options = parser.parse_args()
    result = run(options.threads, options.repeat)
    replace(options.output.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    replace(options.output.with_suffix(".md"), to_markdown(result))
    print(to_markdown(result))


if __name__ == "__main__":
    main()
