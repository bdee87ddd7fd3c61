"""Every way to select visual tokens: accuracy on digits, and what selecting costs; see README.md."""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy import nearest
from torch import fx
from writing import RESULTS, replace, versions

import foveate
from foveate.calibrate import calibrate
from foveate.evaluate import evaluate
from foveate.examples import Example
from foveate.intervals import wilson
from foveate.ir.cost import breakdown
from foveate.ir.program import Program, info, outputs
from foveate.ir.statistics import Statistics
from foveate.machine import environment
from foveate.models import digits
from foveate.models.random import random_inputs, random_llava

TARGETS = (0.5, 0.25, 0.12)
"""Of the visual work in the decoder."""
SEEDS = {"lookup": 8201, "row": 8202}
FULL = {"questions": {"lookup": 200, "row": 100}, "rounds": 7}
QUICK = {"questions": {"lookup": 8, "row": 4}, "rounds": 2}
DECODER = {"layers": 12, "hidden": 1024, "heads": 16, "ffn": 2816, "visual_tokens": 576}
VISION = {"vision_layers": 12, "vision_hidden": 512, "vision_heads": 8}
KEPT = 0.25
CALIBRATION = 64
"""Questions that FitPrune's schedule is found by."""
BLIND = "cut-visual{from_layer=0}"
SHARES = tuple(round(0.01 * step, 2) for step in range(2, 100))
BUDGETS = tuple(share for share in SHARES if share > 0.1)
"""FitPrune deletes nothing before the first layer's attention, which alone is a tenth of the work."""


@dataclass(frozen=True)
class Method:
    """A pipeline with one setting left open, where `@` stands: a share, or a number of `values`.

    at: the pipeline that leaves a quarter of 576 tokens of the benchmark decoder, in place of `@` = 0.25.
    """

    name: str
    template: str
    values: tuple[float, ...] = SHARES
    at: str = ""

    def passes(self, value: float) -> str:
        """The pipeline at one value; `1-@`, `@/4` and so on are worked out."""
        text = self.template.replace("1-@", f"{1 - value:g}")
        for divisor in (8, 4, 2):
            text = text.replace(f"@/{divisor}", f"{value / divisor:g}")
        return text.replace("@", f"{value:g}")

    def quarter(self) -> str:
        """What runs on the benchmark decoder."""
        return self.at or self.passes(KEPT)


METHODS = (
    Method("random", "random-prune{layer=0,keep=@}"),
    Method("uniform grid", "grid-prune{layer=0,keep=@}"),
    Method("average pooling", "average-pool{factor=@}", (4, 3, 2), "average-pool"),
    Method("smaller image", "resize{grid=@}", tuple(range(2, 12)), "resize{grid=12}"),
    Method("FastV", "fastv{layer=1,keep=@}", at="fastv{layer=2,keep=0.25}"),
    Method("PyramidDrop", "pyramiddrop{layers=[1,3,5],keep=@}", at="pyramiddrop{layers=[2,4,6],keep=0.5}"),
    Method(
        "SparseVLM", "sparsevlm{layers=[0,2,4],keeps=[@,@/2,@/4]}", at="sparsevlm{layers=[1,3,5],keeps=[0.5,0.3,0.2]}"
    ),
    Method("DART", "dart{layer=1,keep=@}", at="dart{layer=2,keep=0.25}"),
    Method("DivPrune", "divprune{keep=@}"),
    Method("FasterVLM", "fastervlm{keep=@}"),
    Method("VisPruner", "vispruner{keep=@}"),
    Method("VisionZip", "visionzip{dominant=@,contextual=@/4}", at="visionzip{dominant=0.21,contextual=0.04}"),
    Method("PruMerge", "prumerge{keep=@}"),
    Method("PruMerge+", "prumerge{keep=@,plus=true}"),
    Method("CDPruner, no question", "cdpruner{keep=@,clip=none}"),
    Method("ToMe", "tome{merge=1-@}"),
    Method("CrossGET, not trained", "crossget{merge=1-@}"),
    Method("FitPrune", "fitprune{budget=@}", BUDGETS, at="fitprune{schedule=[0,200,120,60,30,22,0,0,0,0,0,0]}"),
)


def main() -> None:
    """Ask digits at each target, time the benchmark decoder at a quarter; write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few questions, two rounds, a small decoder; needs -o")
    parser.add_argument("--jobs", type=int, default=2, help="settings asked at once, one thread each (default: 2)")
    parser.add_argument("--only", choices=("accuracy", "time"), help="renew this half of the results alone")
    parser.add_argument(
        "--add", action="store_true", help="keep the rows that the results have, measure what is missing"
    )
    parser.add_argument("-o", "--output", type=Path, help=f"folder for the results (default: {RESULTS.name})")
    args = parser.parse_args()
    if args.quick and args.output is None:
        parser.error("--quick needs -o DIR: its figures mean nothing and must not replace the results")
    folder: Path = args.output or RESULTS
    size: dict[str, Any] = QUICK if args.quick else FULL
    file = folder / "selection.json"
    result: dict[str, Any] = json.loads(file.read_text()) if (args.only or args.add) and file.exists() else {}
    known = {half: {row["passes"]: row for row in result.get(half, []) if args.add} for half in ("accuracy", "time")}
    result |= {**size, "seeds": SEEDS, "environment": environment()}

    def keep(**new: Any) -> None:
        result.update(new)
        replace(file, json.dumps(result, indent=2) + "\n")
        replace(folder / "selection.md", markdown(result))

    if args.only != "time":
        rows: list[dict[str, Any]] = []
        for found in asked(size, args.jobs, known["accuracy"]):
            rows += found
            keep(accuracy=[*rows, *(row for row in known["accuracy"].values() if row not in rows)])
        keep(accuracy=rows)
    if args.only != "accuracy":
        decoder = {**DECODER, "layers": 8, "hidden": 64, "heads": 4, "ffn": 96} if args.quick else DECODER
        keep(decoder=decoder, time=timed(decoder, size["rounds"], known["time"]))
    print(markdown(result))


Rows = dict[str, dict[str, Any]]
"""By pipeline."""


def asked(size: dict[str, Any], jobs: int, known: Rows) -> Iterator[list[dict[str, Any]]]:
    """Rows of the dense and the blind model, then those of each method; those that are known as they are."""
    spawn = multiprocessing.get_context("spawn")
    work: list[Method | None] = [None, *METHODS]
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for rows in pool.map(ask, work, [size] * len(work), [known] * len(work)):
            for row in rows:
                print(f"{row['passes'] or 'dense'}: {row['right']}", file=sys.stderr, flush=True)
            yield rows


def ask(method: Method | None, size: dict[str, Any], known: Rows) -> list[dict[str, Any]]:
    """Right answers of a method at each target (None: of no method), and how many visual tokens stay where."""
    model, processor = digits.load()
    found = calibrated(model, processor) if method is not None and "fitprune" in method.template else None
    rows = []
    for row in settings(method, model, found):
        optimized = foveate.optimize(model, row["passes"], found)
        right = known[row["passes"]]["right"] if row["passes"] in known else {}
        for task, n in size["questions"].items():
            if task not in right:
                questions = digits.samples(task=task, n=n, seed=SEEDS[task])
                right[task] = sum(evaluate(optimized, processor, questions).right)
        rows.append({**row, "tokens": lengths(optimized.program), "right": right})
    return rows


def calibrated(model: Any, processor: Any) -> Statistics:
    """What visual tokens receive in training questions."""
    drawn = digits.samples(split="train", task="mixed", n=CALIBRATION, seed=8203)
    return calibrate(model, processor, [Example(each.prompt, [each.image]) for each in drawn], batch=8, tokens=True)


def settings(method: Method | None, model: Any, found: Statistics | None) -> Iterator[dict[str, Any]]:
    """The pipelines of a method whose visual work is nearest to the targets; of no method, dense and blind."""
    program = foveate.trace(model)

    def flops(passes: str) -> tuple[int, int]:
        cost = foveate.cost(foveate.optimize(model, passes, found, traced=program).program, text_tokens=13)
        return cost.prefill.flops, cost.first_token_flops

    (whole, all_of_it), (least, _) = flops(""), flops(BLIND)

    @functools.cache
    def work(value: float) -> float:
        assert method is not None
        return (flops(method.passes(value))[0] - least) / (whole - least)

    if method is None:
        chosen = {"dense": "", "no image": BLIND}
    else:
        values = {nearest(method.values, work, target) for target in TARGETS}
        chosen = {method.passes(value): method.passes(value) for value in sorted(values, reverse=True)}
    for name, passes in chosen.items():
        own, total = flops(passes)
        row = {"name": name if method is None else method.name, "passes": passes}
        yield {**row, "work": (own - least) / (whole - least), "flops": total / all_of_it}


def lengths(program: Program) -> list[int]:
    """Visual tokens that stand in each layer of the decoder."""
    symbol = program.symbols["visual_tokens"].node.expr
    sizes = {-1: program.tokens_left}
    for layer, node in outputs(program.prefill)["kept"].items():
        width = node.meta["val"].shape[1]
        sizes[int(layer)] = int(width.node.expr.subs({symbol: sizes[-1]})) if not isinstance(width, int) else width
    seen = [e[0] is not None for e in outputs(program.prefill)["kv"]]
    return [sizes[max(at for at in sizes if at <= layer)] if seen[layer] else 0 for layer in range(len(seen))]


def timed(decoder: dict[str, int], rounds: int, known: Rows) -> list[dict[str, Any]]:
    """For each method the median of prefills, dense ones in between, and what of it was selecting."""
    model = random_llava(**decoder, **VISION)
    inputs = random_inputs(model, prefix=32, text_tokens=64)
    program = foveate.trace(model)
    dense = foveate.optimize(model, traced=program)
    whole = foveate.cost(dense.program, text_tokens=64).prefill.flops
    rows = []
    for method in METHODS:
        passes = method.quarter()
        if passes in known:
            rows.append(known[passes])
            continue
        optimized = foveate.optimize(model, passes, traced=program)
        times: dict[str, list[float]] = {"dense": [], "optimized": []}
        with torch.inference_mode():
            for each in (dense, optimized):
                each(**inputs, use_cache=False)
            for _ in range(rounds):
                for name, each in (("dense", dense), ("optimized", optimized)):
                    start = time.perf_counter()
                    each(**inputs, use_cache=False)
                    times[name].append(time.perf_counter() - start)
            selecting = statistics.median(share_of_selecting(optimized, inputs) for _ in range(rounds))
        parts = breakdown(optimized.program, by=("role",), text_tokens=64)
        own = sum(part.work.flops for graph in ("vision", "prefill") for part in parts[graph] if part.role == "select")
        found = {name: statistics.median(values) for name, values in times.items()}
        row = {
            "name": method.name,
            "passes": passes,
            **found,
            "selecting_time": selecting,
            "selecting_flops": own / whole,
        }
        print(f"{passes}: {found['dense'] / found['optimized']:.2f}x", file=sys.stderr, flush=True)
        rows.append({**row, "flops": whole / foveate.cost(optimized.program, text_tokens=64).prefill.flops})
    return rows


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


def markdown(result: dict[str, Any]) -> str:
    """Both tables."""
    asked_for = ", ".join(f"{n} {task}" for task, n in result["questions"].items())
    lines = ["# Ways to select visual tokens", "", f"{versions(result['environment'])}.", ""]
    if "accuracy" in result:
        lines += [
            f"On digits: 10 layers, 144 visual tokens, 13 text tokens; held-out questions: {asked_for}.",
            "Visual work: FLOPs in the decoder over the dense model's, both less those of text alone. ±: half of a 95%",
            "interval. Nothing is trained.",
            "",
            "| method | passes | visual work | FLOPs, vision too | tokens by layer | look-up | rows |",
            "|---|---|--:|--:|---|--:|--:|",
        ]
        for row in result["accuracy"]:
            cells = [
                row["name"],
                f"`{row['passes']}`" if row["passes"] else "",
                *(f"{row[k]:.0%}" for k in ("work", "flops")),
            ]
            scores = [points(row["right"][task], n) for task, n in result["questions"].items()]
            lines.append(f"| {' | '.join([*cells, runs(row['tokens']), *scores])} |")
    if "time" in result:
        sizes = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in result["decoder"].items())
        lines += [
            "",
            f"On the benchmark decoder ({sizes}, 64 text tokens, batch 1, fp32, random weights), medians of"
            f" {result['rounds']} prefills, the vision tower and the selection included:",
            "",
            "| method | passes | dense | optimized | speed-up | FLOPs | selecting, FLOPs | selecting, time |",
            "|---|---|--:|--:|--:|--:|--:|--:|",
        ]
        for row in result["time"]:
            faster = row["dense"] / row["optimized"]
            cells = [f"{1000 * row[k]:.0f} ms" for k in ("dense", "optimized")]
            cells += [f"{faster:.2f}x" if faster > 1 else f"**{faster:.2f}x**", f"{row['flops']:.2f}x"]
            cells += [f"{row['selecting_flops']:.2%}", f"{row['selecting_time']:.1%}"]
            lines.append(f"| {row['name']} | `{row['passes']}` | {' | '.join(cells)} |")
        lines += [
            "",
            "FLOPs: dense over optimized, decoder alone. Selecting: its FLOPs over the dense decoder's; its",
            "time over the optimized prefill's, node by node.",
        ]
    return "\n".join(lines) + "\n"


def points(right: int, n: int) -> str:
    """Percent, and half of its interval."""
    low, high = wilson(right, n)
    return f"{right / n:.1%} ±{50 * (high - low):.0f}"


def runs(tokens: list[int]) -> str:
    """`144 x 2, 36 x 8`."""
    parts: list[list[int]] = []
    for count in tokens:
        if parts and parts[-1][0] == count:
            parts[-1][1] += 1
        else:
            parts.append([count, 1])
    return ", ".join(f"{count} x {times}" for count, times in parts)


if __name__ == "__main__":
    main()
