"""Every way to select visual tokens: accuracy on digits, and what selecting costs; see README.md."""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

import torch
from accuracy import nearest
from selection_page import markdown
from torch import fx
from writing import RESULTS, replace

import foveate
from foveate.calibrate import calibrate
from foveate.evaluate import evaluate
from foveate.examples import Example, batch_inputs
from foveate.ir.cost import breakdown
from foveate.ir.modules import MODULE
from foveate.ir.program import Program, info, outputs
from foveate.ir.statistics import Statistics
from foveate.machine import environment
from foveate.models import digits
from foveate.models.random import random_inputs, random_llava
from foveate.passes.pipeline import resolve
from foveate.passes.select.learned import LearnedSelection

TARGETS = (0.5, 0.25, 0.12)
"""Of the visual work in the decoder."""
SEEDS = {"lookup": 8201, "row": 8202}
FULL = {"questions": {"lookup": 200, "row": 100}, "rounds": 5, "prompts": 8}
QUICK = {"questions": {"lookup": 8, "row": 4}, "rounds": 2, "prompts": 2}
DECODER: dict[str, Any] = {"layers": 12, "hidden": 1024, "heads": 16, "ffn": 2816, "visual_tokens": 576}
VISION: dict[str, Any] = {"vision_layers": 12, "vision_hidden": 512, "vision_heads": 8}
KEPT = 0.25
CALIBRATION = 64
"""Questions that FitPrune's schedule is found by."""
TRAINING = "--part modules --steps 120 --batch 8 --lr 1e-3 --seed 0"
"""Of the selections that learn; four minutes each on two cores."""
SELECTS = {"select", "merge", "cross", "cache", MODULE}
"""Roles of nodes that select."""
BLIND = "cut-visual{from_layer=0}"
SHARES = tuple(round(0.01 * step, 2) for step in range(2, 100))
BUDGETS = tuple(share for share in SHARES if share > 0.1)
"""FitPrune deletes nothing before the first layer's attention, which alone is a tenth of the work."""
ADDED = (0.04, 0.05, 0.06, 0.07, 0.08, 0.16, 0.18, 0.2, 0.22, 0.24, 0.4, 0.42, 0.44, 0.46, 0.48)
"""Of an image's tokens, beside those up to the turn of its curve."""


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
    Method(
        "SparseVLM, by rank",
        "sparsevlm{layers=[0,2,4],counts=rank,scale=1-@}",
        at="sparsevlm{layers=[1,3,5],counts=rank,scale=0.8}",
    ),
    Method("CLS curve", "cls-curve{alpha=@,alpha_mode=floor_add}", ADDED, "cls-curve{alpha=0.2,alpha_mode=floor_add}"),
    Method("CLS curve, alpha 0.075", "cls-curve{alpha=@}", (0.075,), "cls-curve{alpha=0.075}"),
    Method(
        "LVPruning, trained",
        "lvpruning{layers=[1,3,5],ratio=@,step=@/4,modules=lvpruning.safetensors}",
        at="lvpruning{layers=[2,4,6],ratio=0.35,step=0.1,modules=MODULES}",
    ),
    Method(
        "DynamicViT, trained",
        "dynamicvit{layers=[1,3,5],keep=@,modules=dynamicvit.safetensors}",
        at="dynamicvit{layers=[2,4,6],keep=0.5,modules=MODULES}",
    ),
    Method(
        "SmartTrim, trained",
        "smarttrim{layers=[1,3,5],keep=@,modules=smarttrim.safetensors}",
        at="smarttrim{layers=[2,4,6],keep=0.1,modules=MODULES}",
    ),
    Method("SnapKV", "snapkv{capacity=@,window=8}", TARGETS, "snapkv{capacity=0.25}"),
    Method("heavy-recent", "heavy-recent{heavy=@/2,recent=@/2}", TARGETS, "heavy-recent{heavy=0.125,recent=0.125}"),
)


def main() -> None:
    """Ask digits at each target, time the benchmark decoder at a quarter; write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few questions, two rounds, a small decoder; needs -o")
    parser.add_argument("--jobs", type=int, default=2, help="settings asked at once, one thread each (default: 2)")
    parser.add_argument("--only", choices=("accuracy", "digits", "time"), help="renew this half of the results alone")
    parser.add_argument(
        "--add", action="store_true", help="keep the rows that the results have, measure what is missing"
    )
    parser.add_argument("-o", "--output", type=Path, help=f"folder for the results (default: {RESULTS.name})")
    parser.add_argument("--modules", type=Path, help="folder of trained modules, made where they are missing")
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

    modules: Path = (args.modules or folder / "modules").resolve()
    modules.mkdir(parents=True, exist_ok=True)
    if args.only != "time":
        train(modules, 2 if args.quick else None)
    if args.only in (None, "accuracy"):
        rows: list[dict[str, Any]] = []
        for found in asked(size, args.jobs, known["accuracy"], modules):
            rows += found
            keep(accuracy=[*rows, *(row for row in known["accuracy"].values() if row not in rows)])
        keep(accuracy=rows)
    if args.only in (None, "digits"):
        for _ in timed_on_digits(result["accuracy"], size, modules, args.add):
            keep(digits_threads=torch.get_num_threads())
    if args.only in (None, "time"):
        decoder = {**DECODER, "layers": 8, "hidden": 64, "heads": 4, "ffn": 96} if args.quick else DECODER
        done: list[dict[str, Any]] = []
        for row in timed(decoder, size["rounds"], known["time"], modules):
            done.append(row)
            keep(decoder=decoder, time_threads=torch.get_num_threads(), time=done)
    print(markdown(result))


Rows = dict[str, dict[str, Any]]
"""By pipeline."""


def train(folder: Path, steps: int | None) -> None:
    """Modules for digits of each selection that learns, by `foveate train`, where the folder has none."""
    for name in ("lvpruning", "dynamicvit", "smarttrim"):
        if not (folder / f"{name}.safetensors").exists():
            passes, options = f"{name}{{layers=[1,3,5]}}", TRAINING.split()
            options += ["--steps", str(steps)] if steps else []
            # An interrupted run leaves its checkpoints beside the file.
            options += ["--resume"] if (folder / f"{name}.safetensors.checkpoints").exists() else []
            command = [sys.executable, "-m", "foveate.cli.main", "train", "digits", "--data", "digits", "-p", passes]
            subprocess.run([*command, *options, "-o", str(folder / f"{name}.safetensors")], check=True)


def placed(passes: str, folder: Path) -> str:
    """A pipeline whose modules lie in a folder."""
    return passes.replace("modules=", f"modules={folder}/")


def asked(size: dict[str, Any], jobs: int, known: Rows, modules: Path) -> Iterator[list[dict[str, Any]]]:
    """Rows of the dense and the blind model, then those of each method; those that are known as they are."""
    spawn = multiprocessing.get_context("spawn")
    work: list[Method | None] = [None, *METHODS]
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for rows in pool.map(ask, work, *([each] * len(work) for each in (size, known, modules))):
            for row in rows:
                print(f"{row['passes'] or 'dense'}: {row['right']}", file=sys.stderr, flush=True)
            yield rows


def ask(method: Method | None, size: dict[str, Any], known: Rows, modules: Path) -> list[dict[str, Any]]:
    """Right answers of a method at each target (None: of no method), and how many visual tokens stay where."""
    model, processor = digits.load()
    found = calibrated(model, processor) if method is not None and "fitprune" in method.template else None
    inputs = prompts(model, processor, 16)
    rows = []
    for row in settings(method, model, found, inputs, modules):
        if row["passes"] in known:
            rows.append({**known[row["passes"]], **row})
            continue
        optimized = foveate.optimize(model, placed(row["passes"], modules), found)
        right = {}
        for task, n in size["questions"].items():
            questions = digits.samples(task=task, n=n, seed=SEEDS[task])
            right[task] = sum(evaluate(optimized, processor, questions).right)
        rows.append({**row, "right": right})
    return rows


def prompts(model: Any, processor: Any, n: int) -> dict[str, Any]:
    """Training questions as one batch."""
    drawn = digits.samples(split="train", task="mixed", n=n, seed=8204)
    examples = [Example(each.prompt, (each.image,)) for each in drawn]
    return batch_inputs(model, processor, examples, 6, padding_side="left")


def calibrated(model: Any, processor: Any) -> Statistics:
    """What visual tokens receive in training questions."""
    drawn = digits.samples(split="train", task="mixed", n=CALIBRATION, seed=8203)
    return calibrate(model, processor, [Example(each.prompt, [each.image]) for each in drawn], batch=8, tokens=True)


def settings(
    method: Method | None, model: Any, found: Statistics | None, inputs: dict[str, Any], modules: Path
) -> Iterator[dict[str, Any]]:
    """The pipelines of a method whose visual work is nearest to the targets; of no method, dense and blind."""
    program = foveate.trace(model)

    @functools.cache
    def price(passes: str) -> tuple[int, int, int, list[int]]:
        optimized = foveate.optimize(model, placed(passes, modules), found, traced=program)
        left = lengths(optimized, inputs)
        counted = {"kept_tokens": left[0]} if optimized.program.depends_on_image else {}
        cost = foveate.cost(optimized.program, text_tokens=13, **counted)
        return cost.prefill.flops, cost.first_token_flops, cost.kv_bytes, left

    (whole, *all_of_it, _), (least, *_) = price(""), price(BLIND)

    def work(value: float) -> float:
        assert method is not None
        return (price(method.passes(value))[0] - least) / (whole - least)

    if method is None:
        chosen = ["", BLIND]
    elif method.values == TARGETS:
        chosen = [method.passes(value) for value in TARGETS]
    else:
        values = {nearest(method.values, work, target) for target in TARGETS}
        chosen = [method.passes(value) for value in sorted(values, reverse=True)]
    for passes in chosen:
        own, total, held, left = price(passes)
        name = method.name if method is not None else "no image" if passes else "dense"
        shares = {"work": (own - least) / (whole - least), "flops": total / all_of_it[0], "kv": held / all_of_it[1]}
        yield {"name": name, "passes": passes, **shares, "tokens": left}


@torch.inference_mode()
def lengths(optimized: Any, inputs: dict[str, Any]) -> list[int]:
    """Visual tokens of a prompt that stand in each layer of the decoder, in the mean over a batch where they differ."""
    program = optimized.program
    sizes = {-1: program.tokens_left}
    if outputs(program.prefill)["kept"] or program.depends_on_image:
        for layer, order in (optimized(**inputs, use_cache=False).kept or {}).items():
            if layer or program.depends_on_image or not program.shortens:
                sizes[layer] = round(float((order >= 0).sum(1).float().mean()))
    seen = [e[0] is not None for e in outputs(program.prefill)["kv"]]
    return [sizes[max(at for at in sizes if at <= layer)] if seen[layer] else 0 for layer in range(len(seen))]


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


if __name__ == "__main__":
    main()
