"""Calibration: a model runs over samples once, and what its attention and neurons do is counted.

statistics = calibrate(model, processor, [Example(prompt, [image]), ...])
fast = foveate.optimize(model, "drop-visual-heads{alpha=0.1}", calibration=statistics)
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from foveate.backends.eager import lower
from foveate.errors import InputError
from foveate.evaluate import Tick, silent
from foveate.examples import Example, batch_inputs
from foveate.ir.observe import observe, only_statistics
from foveate.ir.split import split
from foveate.ir.statistics import Statistics
from foveate.model import OptimizedModel
from foveate.models.registry import family_of, trace_joint
from foveate.ops import PAD
from foveate.streams import Streams

SAVE_EVERY = 32
"""Samples between two saves of what was counted."""


def unfinished(output: Path) -> Path:
    """The file that holds what was counted until `output` is complete."""
    return output.with_name(f"{output.name}.part")


def calibrate(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    *,
    batch: int = 8,
    name: str = "",
    output: Path | None = None,
    resume: bool = False,
    tokens: bool = False,
    tick: Tick = silent,
) -> Statistics:
    """Statistics of a transformers model over examples, `batch` at once; the model is left as it was.

    output: where to save them; until all is counted, `unfinished(output)` holds them, and `resume` goes on from there
    with the same result as a run that was not interrupted. name: of the model, kept in the file. Memory does not grow
    with the number of examples but for two floats a head and example; with `tokens`, for two floats a visual token and
    layer besides, which `fitprune` asks for. Raises InputError for an example that does not
    fit the model, FoveateError subclasses otherwise.
    """
    about = family_of(model).describe(model.config)
    found = Statistics.empty(about, {"model": name, "batch": batch}, tokens)
    if output is not None:
        found = _begin(found, examples, output, resume)
    joint, program = trace_joint(model)
    program.graphs["prefill"] = split(program, joint)
    runner = OptimizedModel(program, model.config, model.generation_config)
    observed = observe(program, tokens)
    run = lower(observed, only_statistics(observed), "prefill")
    saved = found.samples
    for start in range(found.samples, len(examples), batch):
        tick("calibrating", start, len(examples))
        part = examples[start : start + batch]
        with torch.inference_mode():
            inputs, streams = runner.prefill_inputs(**batch_inputs(model, processor, part))
            visual = (streams.visual.order != PAD).sum(1)
            found = found.extended(run(inputs)["statistics"], _later(streams, part), visual)
        if output is not None and found.samples - saved >= SAVE_EVERY:
            saved = _save(found, examples, unfinished(output))
    tick("calibrating", len(examples), len(examples))
    if output is not None:
        _save(found, examples, unfinished(output))
        unfinished(output).replace(output)
    return found


def _begin(fresh: Statistics, examples: Sequence[Example], output: Path, resume: bool) -> Statistics:
    """What an interrupted run has counted, if it is to be resumed; InputError where it is of something else."""
    part = unfinished(output)
    if not part.exists():
        return fresh
    if not resume:
        raise InputError(f"{part} is of a calibration that was interrupted: go on with --resume, or remove it")
    found = Statistics.load(part)
    if found.model != fresh.model:
        raise InputError(f"{part} is of a model of another shape; remove it to start anew")
    for what in ("model", "batch"):
        if found.source.get(what) != fresh.source[what]:
            raise InputError(
                f"{part} was begun with {what} {found.source.get(what)}, not {fresh.source[what]}; "
                "give that, or remove the file to start anew"
            )
    if (found.visual is None) != (fresh.visual is None):
        without = "without" if found.visual is None else "with"
        raise InputError(f"{part} was begun {without} --tokens; go on so, or remove the file to start anew")
    if found.samples > len(examples) or found.source.get("examples") != _digest(examples[: found.samples]):
        raise InputError(f"{part} was begun with other samples; give those, or remove the file to start anew")
    return found


def _save(found: Statistics, examples: Sequence[Example], path: Path) -> int:
    found.source["examples"] = _digest(examples[: found.samples])
    found.save(path)
    return found.samples


def _digest(examples: Sequence[Example]) -> str:
    """What tells one list of examples from another: prompts, places and numbers of images."""
    told = hashlib.sha256()
    for example in examples:
        told.update(repr((example.prompt, example.place, len(example.images))).encode())
    return told.hexdigest()


def _later(streams: Streams, examples: Sequence[Example]) -> torch.Tensor:
    """How many text tokens stand behind each row's first visual token."""
    real = streams.visual.order != PAD
    blind = (~real.any(1)).nonzero()
    if len(blind):
        raise InputError(f"{examples[int(blind[0, 0])].where}: the prompt has no image, so it says nothing of images")
    first = streams.visual.order.amin(1, keepdim=True)
    return ((streams.text.order > first) & (streams.text.order != PAD)).sum(1)
