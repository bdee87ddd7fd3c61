"""Every way to select visual tokens: accuracy on digits, and what selecting costs; see README.md."""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from accuracy import nearest
from selection_methods import BLIND, METHODS, TARGETS, Method, Rows, calibrated, lengths, placed, prompts
from selection_page import markdown
from selection_time import DECODER, timed, timed_on_digits
from writing import RESULTS, needs, replace

import foveate
from foveate.evaluate import evaluate
from foveate.ir.statistics import Statistics
from foveate.machine import environment
from foveate.models import digits

SEEDS = {"lookup": 8201, "row": 8202}
FULL = {"questions": {"lookup": 200, "row": 100}, "rounds": 5, "prompts": 8}
QUICK = {"questions": {"lookup": 8, "row": 4}, "rounds": 2, "prompts": 2}
TRAINING = "--part modules --steps 120 --batch 8 --lr 1e-3 --seed 0"
"""Of the selections that learn; four minutes each on two cores."""


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
    if args.only != "time":
        needs(parser, "accelerate")
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


if __name__ == "__main__":
    main()
