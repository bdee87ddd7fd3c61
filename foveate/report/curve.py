"""The picture of `cls-curve`: how much an image's patches are like CLS, from most to least, and where they are cut.

As in section 3.1 of the paper (arXiv 2409.01162): the curve falls steeply, then turns; what stands in front of the turn
stays, and a little more.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from foveate import ops
from foveate.backends.base import lower_graph
from foveate.errors import InputError
from foveate.ir.program import args_of
from foveate.kernels.tower import cls_likeness, kept_by_curve, turning_point
from foveate.report.plot import COLORS, INK, check_matplotlib


def curve_data(model: Any, pixel_values: Tensor) -> list[dict[str, Any]]:
    """For each of the images [I, 3, H, W]: `likeness`, falling, where it turns (`turn`), how many are `kept`.

    model: an `OptimizedModel`.
    Raises InputError where the model's passes hold no `cls-curve`.
    """
    program = model.program
    chosen = [n for n in program.graphs["vision"].nodes if n.target == ops.cls_curve]
    if not chosen:
        raise InputError("this model's passes hold no cls-curve, so there is no curve to draw")
    run = lower_graph(program, "eager", "vision", program.graphs["vision"])
    with torch.inference_mode():
        hidden = run({"pixel_values": pixel_values.to(program.dtype)})["out"]
        curves = cls_likeness(hidden).sort(dim=1, descending=True).values
        turns, kept = turning_point(curves), kept_by_curve(curves, *args_of(chosen[0])[1:])
    rows = zip(curves.tolist(), turns.tolist(), kept.tolist(), strict=True)
    return [{"likeness": likeness, "turn": turn, "kept": count} for likeness, turn, count in rows]


def curve_png(data: list[dict[str, Any]]) -> bytes:
    """`curve_data` as a PNG: a line an image, a dot where it turns, dashed where it is cut.

    Raises FoveateError where matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axis = figure.subplots()
    for number, image in enumerate(data):
        color = COLORS[(number + 1) % len(COLORS)]
        likeness, turn, kept = image["likeness"], image["turn"], image["kept"]
        label = f"image {number + 1}: {kept} of {len(likeness)} patches stay"
        axis.plot(range(1, len(likeness) + 1), likeness, color=color, linewidth=1.6, label=label)
        axis.plot(turn, likeness[turn - 1], color=color, marker="o", markersize=7, markeredgecolor=INK)
        axis.axvline(kept + 0.5, color=color, linestyle="--", linewidth=1)
    axis.plot([], [], color=INK, marker="o", linestyle="", label="where the curve turns")
    axis.plot([], [], color=INK, linestyle="--", linewidth=1, label="where patches are cut")
    axis.set(xlabel="patches, the most like CLS first", ylabel="likeness to CLS, as a share of 1", ylim=(0, None))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(True, alpha=0.25)
    axis.legend(frameon=False)
    axis.set_title("What patches are worth to CLS inside the vision tower", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
