"""`foveate train`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from foveate.cli.options import AT_LEAST_ONE, PASSES, json_option
from foveate.cli.output import talking

DIGIT_EXAMPLES = 4096
RUN = "run.json"
"""What a run was started with; it lies beside the checkpoints."""


@click.command("train")
@click.argument("model")
@click.option(
    "--data", required=True, metavar="D", help='JSONL of {"image", "prompt", "answer"}, a folder, or "digits".'
)
@click.option("-o", "--output", "folder", required=True, metavar="DIR", help="A folder that does not exist yet.")
@click.option("--passes", "-p", metavar="P", help=PASSES)
@click.option("--steps", type=AT_LEAST_ONE, help="Optimizer steps, instead of epochs.")
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True)
@click.option("--lr", "rate", type=click.FloatRange(min=0, min_open=True), help="[default: 1e-4; with LoRA 2e-4]")
@click.option("--batch", type=AT_LEAST_ONE, default=8, show_default=True, help="Examples at once.")
@click.option("--accumulate", type=AT_LEAST_ONE, default=1, show_default=True, help="Batches to a step.")
@click.option("--lora-rank", type=click.IntRange(min=0), default=0, show_default=True, help="0 trains the weights.")
@click.option(
    "--part", type=click.Choice(["decoder", "all"]), default="decoder", show_default=True, help="What learns."
)
@click.option("--half", is_flag=True, help="bfloat16 autocast over the weights' own type.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--save-every", type=AT_LEAST_ONE, default=100, show_default=True, help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of a run that was interrupted.")
@json_option
def command(
    model: str,
    data: str,
    folder: str,
    passes: str | None,
    rate: float | None,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fine-tune MODEL, pruned, and save it with its processor in the new folder DIR.

    MODEL is a folder made by `foveate optimize`, or any MODEL with --passes. Checkpoints are kept in DIR.checkpoints
    until the run is done.
    """
    from foveate.cli.folders import new_folder

    with talking(as_json) as out, new_folder(folder) as part:
        out.tick("loading the model", 0, 1)
        optimized, processor = _load(model, passes)
        from foveate.cli.data import DigitExamples, read_examples
        from foveate.cli.models import DIGITS
        from foveate.train import Collator, Settings, check_lengths, finetune

        settings = Settings(rate=rate or (2e-4 if options["lora_rank"] else 1e-4), **options)
        if data == DIGITS:
            count = (settings.steps or 0) * settings.batch * settings.accumulate or DIGIT_EXAMPLES
            examples: Any = DigitExamples(count, settings.seed)
        else:
            examples = read_examples(data, processor, answers=True)
            check_lengths(optimized, Collator(processor), examples)
        told = {"model": model, "data": data, "passes": [r.text for r in optimized.program.passes], **vars(settings)}
        with _checkpoints(folder, told, resume) as work:
            result = finetune(optimized, processor, examples, settings, work, resume=resume, tick=out.tick)
        optimized.save_pretrained(part)
        processor.save_pretrained(part)
        shutil.rmtree(work)
        first, last = (result.to_json()[f"{which}_loss"] for which in ("first", "last"))
        out.line(
            f"{result.steps} steps in {result.seconds:.0f} s, {result.parameters:,} parameters: loss {first:.3f} -> "
            f"{last:.3f}"
        )
        out.line(f"saved in {folder}")
        out.finish({"folder": folder, "examples": len(examples), **told, **result.to_json()})


def _load(model: str, passes: str | None) -> tuple[Any, Any]:
    """The optimized model and its processor."""
    from foveate.cli.errors import UseError
    from foveate.cli.models import is_saved, load_model, load_saved, saved_processor
    from foveate.passes.pipeline import resolve

    if is_saved(model):
        if passes is not None:
            raise UseError(f"{model} was saved by foveate and has its passes already; leave --passes out")
        return load_saved(model, "eager"), saved_processor(model)
    chosen = resolve(passes)
    loaded = load_model(model)
    processor = loaded.get_processor()
    import foveate

    return foveate.optimize(loaded.model, chosen), processor


@contextmanager
def _checkpoints(folder: str, told: dict[str, Any], resume: bool) -> Iterator[Path]:
    """Where checkpoints lie; after an error the folder stays only if there is something in it to resume from.

    Raises UseError where those of another run are in the way, or there is no run to resume.
    """
    from foveate.cli.errors import UseError
    from foveate.files import write_whole

    work = Path(f"{folder}.checkpoints").expanduser()
    run = work / RUN
    if resume:
        if not run.is_file():
            raise UseError(f"there is no {run}: no run to {folder} was interrupted, so leave --resume out")
        try:
            before = dict(json.loads(run.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise UseError(f"{run} cannot be read: {error}") from None
        changed = [name for name in told if before.get(name) != told[name]]
        if changed:
            name = changed[0]
            raise UseError(f"the run in {work} was started with {name}={before.get(name)!r}, not {told[name]!r}")
    elif work.exists():
        raise UseError(f"{work} holds an interrupted run: add --resume to go on with it, or remove that folder")
    else:
        work.mkdir()
        write_whole(run, json.dumps(told).encode())
    try:
        yield work
    except BaseException:
        if not any(work.glob("checkpoint-*")):
            shutil.rmtree(work)
        raise
