"""Trains the bundled model: `python -m foveate.models.digits.train --output DIR`.

Two stages (`pretrain`, `instruct`), then the model is stored as float16, loaded back and measured on
held-out digits; the figures go into the model card. The defaults made the bundled weights. The same
machine with the same number of threads gives the same weights; another machine gives similar ones. Where
other work shares the cores, set OMP_WAIT_POLICY=passive: threads that spin while they wait are slow then.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.utils import logging as transformers_logging

from foveate.models.digits import samples
from foveate.models.digits.architecture import build_model
from foveate.models.digits.card import Results, write_card
from foveate.models.digits.evaluate import accuracy
from foveate.models.digits.instruct import train_whole
from foveate.models.digits.pretrain import PlaceHead, train_tower
from foveate.models.digits.processing import build_processor
from foveate.models.digits.progress import Progress
from foveate.models.digits.questions import TASKS
from foveate.models.digits.saving import save_folder
from foveate.models.digits.schedule import Plan

CHECK_SEED = 77
"""Seed of the held-out samples looked at while training."""

MEASURE_SEED = 1234
"""Seed of the held-out samples behind the figures of the card."""


def train(plan: Plan, folder: Path, progress: Progress) -> Results:
    """Runs the whole plan, writes `folder`, and returns what was measured on the stored weights."""
    started = time.perf_counter()
    torch.set_num_threads(plan.threads)
    torch.manual_seed(plan.seed)
    rng = np.random.default_rng(plan.seed)
    processor = build_processor()
    model = build_model(processor.tokenizer)
    count = sum(parameter.numel() for parameter in model.parameters())
    progress.line(f"{count:,} parameters, {plan.threads} threads, seed {plan.seed}")

    head = PlaceHead(model.config.text_config.hidden_size)
    train_tower(model, processor.tokenizer.get_vocab(), head, rng, plan, progress)
    checks = {task: samples(task=task, n=plan.check, seed=CHECK_SEED) for task in TASKS}
    # The folder is rewritten at every report, so a run that is cut short leaves its last state.
    train_whole(model, processor, head, rng, plan, progress, checks, lambda: save_folder(model, processor, folder))
    seconds = time.perf_counter() - started
    progress.line(f"trained in {seconds / 60:.1f} minutes")

    size = save_folder(model.eval(), processor, folder)
    results = Results(plan, count, size, seconds, measure(folder, plan.measure))
    write_card(folder, results)
    figures = ", ".join(f"{task} {share:.1%}" for task, share in results.accuracy.items())
    progress.line(f"held out, stored weights, {plan.measure} samples a task: {figures}")
    progress.line(f"wrote {folder} ({size:,} bytes of weights)")
    return results


def measure(folder: Path, count: int) -> dict[str, float]:
    """Held-out accuracy per task, 0..1, of the weights as stored in `folder`, on `count` samples each."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    processor = LlavaProcessor.from_pretrained(folder, local_files_only=True)
    drawn = {task: samples(task=task, n=count, seed=MEASURE_SEED) for task in TASKS}
    return {task: accuracy(model.eval(), processor, part) for task, part in drawn.items()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    plan = Plan()
    parser = argparse.ArgumentParser(
        prog="python -m foveate.models.digits.train",
        description="Train the bundled digits model from scratch and write it to a folder.",
    )
    parser.add_argument("--output", type=Path, help="folder to write (needed)")
    parser.add_argument("--steps", type=int, default=plan.steps, help="second stage (%(default)s)")
    parser.add_argument("--tower-steps", type=int, default=plan.tower_steps, help="first stage (%(default)s)")
    parser.add_argument("--seed", type=int, default=plan.seed, help="seed of weights and data (%(default)s)")
    parser.add_argument("--threads", type=int, default=plan.threads, help="CPU threads (%(default)s)")
    parser.add_argument("--full-precision", action="store_true", help="float32 only, which is slower")
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds; the result is useless")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit status."""
    options = parse(arguments)
    if options.output is None:
        sys.stderr.write("error: name a folder with --output; bundled weights are not replaced unasked\n")
        return 2
    plan = Plan(
        seed=options.seed,
        threads=options.threads,
        tower_steps=options.tower_steps,
        steps=options.steps,
        half=not options.full_precision,
    )
    if options.quick:
        plan = plan.quick()
    transformers_logging.disable_progress_bar()
    train(plan, options.output, Progress())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
