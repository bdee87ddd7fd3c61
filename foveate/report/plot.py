"""Pictures of a forecast: the roofline with each program on it, and what each layer costs."""

from __future__ import annotations

import io
from importlib.util import find_spec
from typing import Any

from foveate.errors import FoveateError
from foveate.ir.cost import Part
from foveate.report.figures import count, spaced, times
from foveate.report.forecast import ForecastReport

COLORS = ("#555555", "#d1495b", "#00798c", "#edae49", "#66418a", "#3c6e47")
"""Dense first; told apart by people who do not tell red from green, and by markers."""

MARKERS = "osD^vP"
INK = "#222222"


def check_matplotlib() -> None:
    """Raise FoveateError where matplotlib is not installed."""
    if find_spec("matplotlib") is None:
        raise FoveateError('a plot needs matplotlib: pip install "foveate[plot]"')


def forecast_png(report: ForecastReport) -> bytes:
    """A PNG: above, FLOP/s over FLOPs per byte under the device's roof; below, predicted time layer by layer.

    Raises FoveateError where matplotlib is not installed.
    """
    check_matplotlib()
    from matplotlib.figure import Figure

    layers = [row.forecast.parts(["layer", "stream"])["prefill"] for row in report.rows]
    figure = Figure(figsize=(9, 4.2 + 1.5 * len(layers)), layout="constrained")
    axes = figure.subplots(1 + len(layers), 1, height_ratios=[2.2, *(1 for _ in layers)])
    told = report.setting
    figure.suptitle(
        f"{told['model']} on {report.device.name}: {told['visual_tokens']} visual + {told['text_tokens']} text tokens, "
        f"batch {told['batch']} (predicted)",
        fontsize=11,
    )
    _roofline(axes[0], report)
    highest = max(sum(p.work.time_s for p in found if p.layer == layer) for found in layers for layer in _layers(found))
    for place, found in enumerate(layers):
        _bars(axes[1 + place], report, place, found, 1e3 * highest)
    axes[-1].set_xlabel("decoder layer")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _roofline(axis: Any, report: ForecastReport) -> None:
    device = report.device
    peak = device.rate(report.dense.forecast.precision.dtype)
    ridge = peak / device.bytes_per_s
    points = [
        (label, graph, work)
        for label, row in zip(report.labels, report.rows, strict=True)
        for graph, work in (("prefill", row.cost.prefill), ("decode", row.cost.decode))
        if work.flops and work.bytes and work.time_s
    ]
    intensities = [work.flops / work.bytes for _, _, work in points]
    low, high = min([*intensities, ridge]) / 4, max([*intensities, ridge]) * 4
    axis.plot([low, ridge, high], [low * device.bytes_per_s, peak, peak], color=INK, linewidth=1.5)
    axis.annotate(f"{count(peak)}FLOP/s", (high, peak), ha="right", va="bottom", fontsize=8, color=INK)
    axis.annotate(
        f"{count(device.bytes_per_s)}B/s",
        (low * 1.3, low * 1.3 * device.bytes_per_s),
        ha="right",
        va="bottom",
        fontsize=8,
        color=INK,
        xytext=(-4, 6),
        textcoords="offset points",
    )
    for label, graph, work in points:
        place = report.labels.index(label)
        axis.scatter(
            work.flops / work.bytes,
            work.flops / work.time_s,
            marker=MARKERS[place % len(MARKERS)],
            facecolor=COLORS[place % len(COLORS)] if graph == "prefill" else "white",
            edgecolor=COLORS[place % len(COLORS)],
            s=55,
            zorder=3,
            label=f"{label}, {graph}",
        )
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte moved", ylabel="FLOP/s")
    axis.grid(True, which="major", alpha=0.25)
    axis.legend(fontsize=8, loc="lower right", ncols=2, frameon=False)


def _bars(axis: Any, report: ForecastReport, place: int, parts: list[Part], highest: float) -> None:
    color = COLORS[place % len(COLORS)]
    layers = _layers(parts)
    base = [0.0] * len(layers)
    for stream, alpha in (("visual", 1.0), ("text", 0.45), ("none", 0.2)):
        heights = [
            1e3 * sum(p.work.time_s for p in parts if p.layer == layer and p.stream == stream) for layer in layers
        ]
        if any(heights):
            axis.bar(layers, heights, bottom=base, color=color, alpha=alpha, label=stream, width=0.85)
        base = [b + h for b, h in zip(base, heights, strict=True)]
    row, label = report.rows[place], report.labels[place]
    gain = report.speedup(row)["first_token_time"]
    name = "dense" if not place else f"{label}: {spaced(row.name)}, first token {times(gain) if gain else '-'}"
    axis.set_title(name if len(name) < 110 else f"{name[:107]}...", fontsize=9, loc="left")
    axis.set(ylabel="ms", ylim=(0, 1.3 * highest), xlim=(-0.7, report.dense.forecast.program.info.layers - 0.3))
    axis.legend(fontsize=7, ncols=3, frameon=False, loc="upper right")


def _layers(parts: list[Part]) -> list[int]:
    return sorted({part.layer for part in parts if part.layer is not None})
