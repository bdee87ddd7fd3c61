"""`foveate train`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from foveate.cli.options import AT_LEAST_ONE, PASSES, json_option
from foveate.cli.output import Out, talking

if TYPE_CHECKING:
    from foveate.train import Settings, Trained

DIGIT_EXAMPLES = 4096
NOT_NEGATIVE = click.FloatRange(min=0)
RUN = "run.json"
"""What a run was started with; it lies beside the checkpoints."""


@click.command("train")
@click.argument("model")
@click.option(
    "--data", required=True, metavar="D", help='JSONL of {"image", "prompt", "answer"}, a folder, or "digits".'
)
@click.option(
    "-o",
    "--output",
    required=True,
    metavar="DIR",
    help="A folder that does not exist yet; for modules FILE.safetensors.",
)
@click.option("--passes", "-p", metavar="P", help=PASSES)
@click.option("--steps", type=AT_LEAST_ONE, help="Optimizer steps, instead of epochs.")
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), default=1.0, show_default=True)
@click.option("--lr", "rate", type=click.FloatRange(min=0, min_open=True), help="[default: 1e-4; with LoRA 2e-4]")
@click.option("--batch", type=AT_LEAST_ONE, default=8, show_default=True, help="Examples at once.")
@click.option("--accumulate", type=AT_LEAST_ONE, default=1, show_default=True, help="Batches to a step.")
@click.option("--lora-rank", type=click.IntRange(min=0), default=0, show_default=True, help="0 trains the weights.")
@click.option(
    "--part",
    type=click.Choice(["decoder", "all", "modules"]),
    default="decoder",
    show_default=True,
    help="What learns; modules: those of the last pass, and the model stays as it is.",
)
@click.option(
    "--ratio-weight", type=NOT_NEGATIVE, default=2.0, show_default=True, help="modules: of the share of tokens kept."
)
@click.option("--ratio-loss", type=click.Choice(["mse", "huber"]), default="mse", show_default=True, help="modules.")
@click.option(
    "--distill", type=NOT_NEGATIVE, help="modules: weight of the KL to the whole model.  [default: the pass's]"
)
@click.option("--half", is_flag=True, help="bfloat16 autocast over the weights' own type.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--save-every", type=AT_LEAST_ONE, default=100, show_default=True, help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint of a run that was interrupted.")
@json_option
def command(
    model: str,
    data: str,
    output: str,
    passes: str | None,
    rate: float | None,
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Fine-tune MODEL, pruned, and save it with its processor in the new folder DIR.

    MODEL is a folder made by `foveate optimize`, or any MODEL with --passes. Checkpoints are kept in DIR.checkpoints
    until the run is done. With --part modules the modules of the last pass, such as lvpruning, learn instead and are
    saved in the file DIR, for its option modules=DIR.
    """
    from foveate.cli.errors import UseError

    with talking(as_json) as out:
        from foveate.train import Settings

        settings = Settings(rate=rate or (2e-4 if options["lora_rank"] else 1e-4), **options)
        if settings.part == "modules" and settings.lora_rank:
            raise UseError("--lora-rank is for the model's weights; leave it out with --part modules")
        run = _modules if settings.part == "modules" else _weights
        told, result = run(out, Request(model, data, output, passes, resume), settings)
        first, last = (result.to_json()[f"{which}_loss"] for which in ("first", "last"))
        out.line(
            f"{result.steps} steps in {result.seconds:.0f} s, {result.parameters:,} parameters: loss {first:.3f} -> "
            f"{last:.3f}"
        )
        if result.terms:
            parts = (f"{name.removesuffix('_loss')} {value:.3f}" for name, value in result.terms[-1][1].items())
            out.line(f"of which at the end: {', '.join(parts)}")
        out.line(f"saved in {output}")
        out.finish({"folder": output, **told, **result.to_json()})


@dataclass(frozen=True)
class Request:
    """What a run is asked for."""

    model: str
    data: str
    output: str
    passes: str | None
    resume: bool


def _weights(out: Out, request: Request, settings: Settings) -> tuple[dict[str, Any], Trained]:
    """Train the model's own weights into a new folder."""
    from foveate.cli.folders import new_folder

    with new_folder(request.output) as part:
        out.tick("loading the model", 0, 1)
        optimized, processor = _load(request.model, request.passes)
        from foveate.train import finetune

        examples = _examples(request.data, processor, optimized, settings)
        told = _told(request, [r.text for r in optimized.program.passes], settings)
        with _checkpoints(request.output, told, request.resume) as work:
            result = finetune(optimized, processor, examples, settings, work, resume=request.resume, tick=out.tick)
        optimized.save_pretrained(part)
        processor.save_pretrained(part)
        shutil.rmtree(work)
    return {"examples": len(examples), **told}, result


def _modules(out: Out, request: Request, settings: Settings) -> tuple[dict[str, Any], Trained]:
    """Train a selection's modules into a new file."""
    from foveate.cli.errors import UseError
    from foveate.cli.folders import check_file
    from foveate.cli.models import is_saved, load_model
    from foveate.passes.pipeline import pipeline_text, resolve

    path = check_file(request.output, ".safetensors")
    if path.exists():
        raise UseError(f"output file {request.output} exists already; give a new one, or remove it")
    if is_saved(request.model):
        raise UseError(f"{request.model} was saved by foveate; modules are trained for the original model")
    chosen = resolve(request.passes)
    out.tick("loading the model", 0, 1)
    loaded = load_model(request.model)
    processor = loaded.get_processor()
    from foveate.learn import learn_modules, learner

    trained = learner(loaded.model, chosen, settings)
    examples = _examples(request.data, processor, trained, settings)
    told = _told(request, [pipeline_text([each]) for each in chosen], settings)
    with _checkpoints(request.output, told, request.resume) as work:
        modules, result = learn_modules(trained, processor, examples, work, resume=request.resume, tick=out.tick)
    modules.save(path)
    shutil.rmtree(work)
    return {"examples": len(examples), **told}, result


def _told(request: Request, passes: list[str], settings: Settings) -> dict[str, Any]:
    """What a run that is resumed must share with the one that was interrupted."""
    return {"model": request.model, "data": request.data, "passes": passes, **vars(settings)}


def _examples(data: str, processor: Any, model: Any, settings: Settings) -> Any:
    """What is learnt from; UseError or InputError names the sample that does not fit."""
    from foveate.cli.data import DigitExamples, read_examples
    from foveate.cli.models import DIGITS
    from foveate.train import Collator, check_lengths

    if data == DIGITS:
        count = (settings.steps or 0) * settings.batch * settings.accumulate or DIGIT_EXAMPLES
        return DigitExamples(count, settings.seed)
    examples = read_examples(data, processor, answers=True)
    check_lengths(model, Collator(processor), examples)
    return examples


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
