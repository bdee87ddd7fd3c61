"""One table: the dense model and each recipe, by FLOPs, predicted and measured time, cache and accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from foveate.api import cost, optimize, trace
from foveate.bench import Inputs, Timing, measure
from foveate.evaluate import Score, Tick, evaluate, silent
from foveate.ir.cost import Cost
from foveate.ir.cost.devices import Device
from foveate.models.digits import Sample
from foveate.report.figures import ms

DENSE = "dense"


@dataclass(frozen=True)
class Row:
    """One model of the table: the dense one (no passes) or a recipe."""

    name: str
    passes: str
    model: Any
    cost: Cost
    timing: Timing
    score: Score

    @property
    def predicted_s(self) -> float:
        """Prefill time, vision included, by the roofline of the device that the cost was asked for."""
        return self.cost.first_token_s

    def to_json(self) -> dict[str, Any]:
        """All figures; times in seconds."""
        return {
            "name": self.name,
            "passes": self.passes,
            "flops": self.cost.first_token_flops,
            "predicted_s": self.predicted_s,
            "prefill_s": self.timing.prefill_s,
            "decode_s": self.timing.decode_s,
            "kv_bytes": self.cost.kv_bytes,
            **self.score.to_json(),
        }


def compare(
    model: Any,
    processor: Any,
    recipes: Mapping[str, str],
    samples: Sequence[Sample],
    *,
    timed: Sequence[Sample],
    device: Device,
    repeat: int = 7,
    new_tokens: int = 8,
    batch: int = 32,
    tick: Tick = silent,
) -> list[Row]:
    """Rows for the dense model and for each recipe (name -> pipeline), all timed in turn on the same prompts.

    Times and costs are of one batch of the samples `timed`, best of one length; accuracy is over `samples`.
    """
    pipelines = {DENSE: "", **recipes}
    optimized: dict[str, Any] = {}
    program = trace(model)
    for place, (name, passes) in enumerate(pipelines.items()):
        tick("optimizing", place, len(pipelines))
        optimized[name] = optimize(model, passes, traced=program)
    tick("optimizing", len(pipelines), len(pipelines))
    inputs = batch_inputs(processor, timed)
    with torch.inference_mode():
        times = measure(optimized, inputs, repeat, new_tokens, tick)
    sizes = token_counts(optimized[DENSE], inputs)
    rows = []
    for place, (name, passes) in enumerate(pipelines.items()):
        label = f"asking {len(samples)} questions {place + 1}/{len(pipelines)}, {name}"
        score = evaluate(optimized[name], processor, samples, batch=batch, tick=tick, label=label)
        spent = cost(optimized[name].program, **sizes, device=device)
        rows.append(Row(name, passes, optimized[name], spent, times[name], score))
    return rows


def losses(rows: Sequence[Row]) -> list[str]:
    """Where a recipe measured slower than the dense model, which is the first row; one remark for each phase."""
    remarks = []
    for phase in ("prefill", "decode"):
        before, *after = (float(getattr(row.timing, f"{phase}_s")) for row in rows)
        slow = [f"{row.name} {ms(time)}" for row, time in zip(rows[1:], after, strict=True) if time > before]
        if slow:
            remarks.append(f"{phase} of {', '.join(slow)} against {ms(before)} ms")
    return remarks


def batch_inputs(processor: Any, samples: Sequence[Sample]) -> Inputs:
    """The samples' prompts as one left-padded batch."""
    encoded = processor(
        text=[sample.prompt for sample in samples],
        images=[sample.image for sample in samples],
        padding=True,
        return_tensors="pt",
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask", "pixel_values")}


def token_counts(model: Any, inputs: Inputs) -> dict[str, int]:
    """Sizes of a batch as `foveate.cost` takes them (padding counts as text: it is computed too)."""
    batch, length = inputs["input_ids"].shape
    visual = int((inputs["input_ids"] == model.program.info.image_token_id).sum()) // batch
    return {"visual_tokens": visual, "text_tokens": length - visual, "batch": batch}
