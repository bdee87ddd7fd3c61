"""What selecting costs: prefills in turn with dense ones, and the share of their nodes that select."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch
from selection_methods import METHODS, Rows, calibrated, lengths, placed, prompts
from torch import fx

import foveate
from foveate.ir.cost import breakdown
from foveate.ir.modules import MODULE
from foveate.ir.program import Program, info, outputs
from foveate.models import digits
from foveate.models.random import random_inputs, random_llava
from foveate.passes.pipeline import resolve
from foveate.passes.select.learned import LearnedSelection

DECODER: dict[str, Any] = {"layers": 12, "hidden": 1024, "heads": 16, "ffn": 2816, "visual_tokens": 576}
VISION: dict[str, Any] = {"vision_layers": 12, "vision_hidden": 512, "vision_heads": 8}
SELECTS = {"select", "merge", "cross", "cache", MODULE}
"""Roles of nodes that select."""


def timed_on_digits(
    rows: list[dict[str, Any]], size: dict[str, Any], modules: Path, add: bool
) -> Iterator[dict[str, Any]]:
    """Gives each row the medians of prefills of a few prompts, dense ones in between, and what of it was selecting."""
    model, processor = digits.load()
    program, found = foveate.trace(model), calibrated(model, processor)
    inputs = prompts(model, processor, size["prompts"])
    dense = foveate.optimize(model, traced=program)
    for row in rows:
        if row["passes"] and not (add and "prefill_time" in row):
            stats = found if "fitprune" in row["passes"] else None
            optimized = foveate.optimize(model, placed(row["passes"], modules), stats, traced=program)
            times, share = in_turn(dense, optimized, inputs, size["rounds"])
            row.update(prefill_time=times["optimized"] / times["dense"], selecting_time=share)
            print(f"{row['passes']}: {row['prefill_time']:.0%}", file=sys.stderr, flush=True)
            yield row


@torch.inference_mode()
def in_turn(dense: Any, optimized: Any, inputs: dict[str, Any], rounds: int) -> tuple[dict[str, float], float]:
    """Median seconds of both models' prefills, which take turns, and the share of the second's that was selecting."""
    times: dict[str, list[float]] = {"dense": [], "optimized": []}
    # An eviction acts on what a prefill leaves in the cache.
    cached = "held" in outputs(optimized.program.prefill)
    for each in (dense, optimized):
        each(**inputs, use_cache=cached)
    for _ in range(rounds):
        for name, each in (("dense", dense), ("optimized", optimized)):
            start = time.perf_counter()
            each(**inputs, use_cache=cached)
            times[name].append(time.perf_counter() - start)
    share = statistics.median(share_of_selecting(optimized, inputs) for _ in range(min(rounds, 3)))
    return {name: statistics.median(values) for name, values in times.items()}, share


def timed(decoder: dict[str, Any], rounds: int, known: Rows, modules: Path) -> Iterator[dict[str, Any]]:
    """For each method the median of prefills, dense ones in between, and what of it was selecting."""
    model = random_llava(**decoder, **VISION)
    inputs = random_inputs(model, prefix=32, text_tokens=64)
    program = foveate.trace(model)
    dense = foveate.optimize(model, traced=program)
    whole = foveate.cost(dense.program, text_tokens=64).prefill.flops
    for method in METHODS:
        passes = method.quarter()
        if passes in known:
            yield known[passes]
            continue
        optimized = foveate.optimize(model, untrained(passes, program, modules), traced=program)
        times, share = in_turn(dense, optimized, inputs, rounds)
        counted: dict[str, Any] = {"text_tokens": 64}
        if optimized.program.depends_on_image:
            counted["kept_tokens"] = lengths(optimized, inputs)[0]
        parts = breakdown(optimized.program, by=("role",), **counted)
        own = sum(part.work.flops for graph in ("vision", "prefill") for part in parts[graph] if part.role in SELECTS)
        flops = whole / foveate.cost(optimized.program, **counted).prefill.flops
        row = {"name": method.name, "passes": passes, **times, "selecting_time": share, "selecting_flops": own / whole}
        print(f"{passes}: {times['dense'] / times['optimized']:.2f}x", file=sys.stderr, flush=True)
        yield {**row, "flops": flops}


def untrained(passes: str, program: Program, folder: Path) -> str:
    """A pipeline whose modules, if it has some, are new ones in a file: what they say does not matter to the clock."""
    if "MODULES" not in passes:
        return passes
    (each,) = resolve(passes)
    assert isinstance(each, LearnedSelection)
    file = folder / f"decoder-{each.name}.safetensors"
    file.unlink(missing_ok=True)
    changed(each, modules=None).new(program, 0).save(file)
    return passes.replace("MODULES", str(file))


def share_of_selecting(model: Any, inputs: Any) -> float:
    """Of one prefill's time, node by node, what scores, sorts and gathers took."""
    watch = Watch(model)
    pixels = {"pixel_values": inputs["pixel_values"]}
    watch.run("vision", pixels)
    watch.run("prefill", model.prefill_inputs(**inputs)[0])
    return watch.selecting / watch.all


class Watch:
    """Runs a program's graphs as they stand and adds up the time of their nodes."""

    def __init__(self, model: Any) -> None:
        self.program = model.program
        self.names = {record.text.partition("{")[0] for record in self.program.passes}
        self.selecting = self.all = 0.0

    def run(self, name: str, inputs: dict[str, Any]) -> None:
        """One graph."""
        graph = self.program.graphs[name]
        own = self

        class Timed(fx.Interpreter):
            def run_node(self, node: fx.Node) -> Any:
                start = time.perf_counter()
                result = super().run_node(node)
                spent = time.perf_counter() - start
                own.all += spent
                if node.op == "call_function" and info(node).by in own.names:
                    own.selecting += spent
                return result

        needed = [inputs[node.name] for node in graph.nodes if node.op == "placeholder"]
        Timed(fx.GraphModule(self.program.weights, graph)).run(*needed)
