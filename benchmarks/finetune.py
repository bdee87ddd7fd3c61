"""What a short fine-tune gives back to a pruned `digits`; see README.md."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import foveate
from foveate.cli.examples import DigitExamples
from foveate.evaluate import evaluate
from foveate.machine import thread_count
from foveate.models import digits
from foveate.train import Settings, finetune

ASKED = {"lookup": 200, "row": 100}
"""Held-out questions of each kind; counting is left out, because the model never learnt it."""

RUNS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("cut-visual{from_layer=3}", {"rate": 1e-3}),
    ("drop-visual-heads{keep=1,from_layer=2}", {"rate": 1e-3}),
    ("cut-visual{from_layer=3}", {"rate": 3e-3, "lora_rank": 16}),
)


def main() -> None:
    """Prune, ask, train, ask again; each row is written as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--quick", action="store_true", help="two steps, ten questions: proves that it works")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    if options.quick and options.output == Path(__file__).parent / "results":
        parser.error("--quick needs -o, so that the results of a full run stay")
    asked = dict.fromkeys(ASKED, 5) if options.quick else ASKED
    steps = 2 if options.quick else options.steps
    torch.set_num_threads(1)
    rows = []
    with thread_count(1):
        dense, processor = digits.load()
        questions = {task: digits.samples(task=task, n=n, seed=0) for task, n in asked.items()}
        reference = {task: evaluate(dense, processor, drawn).accuracy for task, drawn in questions.items()}
        # One image and the words of a look-up, as the processor counts them.
        words = len(processor.tokenizer(questions["lookup"][0].prompt).input_ids) - 1
        base = foveate.cost(foveate.trace(dense), text_tokens=words).prefill.flops
        for passes, how in RUNS:
            # A model of its own, because training changes the weights that an optimized model shares.
            model, _ = digits.load()
            opt = foveate.optimize(model, passes)
            before = {task: evaluate(opt, processor, drawn).accuracy for task, drawn in questions.items()}
            settings = Settings(steps=steps, batch=options.batch, **how)
            examples = DigitExamples(steps * options.batch, settings.seed)
            with tempfile.TemporaryDirectory() as work:
                run = finetune(opt, processor, examples, settings, Path(work), tick=tell)
            after = {task: evaluate(opt, processor, drawn).accuracy for task, drawn in questions.items()}
            share = foveate.cost(opt.program, text_tokens=words).prefill.flops / base
            rows.append({"passes": passes, **how, "flops": share, "before": before, "after": after, **run.to_json()})
            write(options.output, steps, options.batch, asked, reference, rows)


def tell(label: str, done: int, total: int) -> None:
    if done % 10 == 0 or done == total:
        print(f"{label} {done} of {total}", flush=True)


def write(
    folder: Path, steps: int, batch: int, asked: dict[str, int], dense: dict[str, float], rows: list[dict[str, Any]]
) -> None:
    """JSON with every figure, Markdown with the table."""
    versions = {"foveate": foveate.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    data = {"versions": versions, "steps": steps, "batch": batch, "n": asked, "dense": dense, "rows": rows}
    names = ("look-up" if task == "lookup" else f"{task}s" for task in asked)
    lines = [
        "# A short fine-tune after pruning",
        "",
        f"`python benchmarks/finetune.py`: `digits`, {steps} steps of {batch} questions about training digits (one "
        "third look-up, count, row each), AdamW, cosine schedule, decoder only, fp32, one thread of a busy machine; "
        f"{' and '.join(f'{n} {task} questions' for task, n in asked.items())} on held-out digits, "
        f"± is half of a 95% interval. torch {versions['torch']}, transformers {versions['transformers']}.",
        "",
        f"| passes | trained | prefill FLOPs | {' | '.join(names)} | loss | seconds |",
        f"|---|---|--:|{'--:|' * len(asked)}--:|--:|",
        f"| dense | | 100% | {' | '.join(percent(dense[task], n) for task, n in asked.items())} | | |",
    ]
    for row in rows:
        how = f"LoRA rank {row['lora_rank']}" if row.get("lora_rank") else "weights"
        scores = (
            f"{percent(row['before'][task], n)} -> **{percent(row['after'][task], n)}**" for task, n in asked.items()
        )
        lines.append(
            f"| `{row['passes']}` | {how}, {row['parameters']:,} at {row['rate']:g} | {row['flops']:.0%} | "
            f"{' | '.join(scores)} | {row['first_loss']:.2f} -> {row['last_loss']:.2f} | {row['seconds']:.0f} |"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in (("json", json.dumps(data, indent=2)), ("md", "\n".join(lines))):
        part = folder / f"finetune-digits.{name}.part"
        part.write_text(text + "\n", encoding="utf-8")
        part.replace(folder / f"finetune-digits.{name}")


def percent(share: float, n: int) -> str:
    """A share of n with half of its 95% (Wilson) interval."""
    spread = 1.96 / (1 + 1.96**2 / n) * math.sqrt(share * (1 - share) / n + 1.96**2 / (4 * n * n))
    return f"{share:.1%} ±{100 * spread:.0f}"


if __name__ == "__main__":
    main()
