"""Pictures of the diff page, as inline SVG that stretches: words and figures stand beside it as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from foveate.report.figures import count, size
from foveate.report.page.figures import duration, layers_text, number
from foveate.report.page.markup import Html, tag

STREAMS = ("visual", "text", "joint", "none")
"""From the bottom of a stack to its top."""

MOST_LAYERS = 400
"""A picture of more layers would be too fine to see, and a hostile file could name millions."""

MOST_FLOPS = 1e300
"""No model computes so much; sums of more would leave what a float can hold."""

FEW_LAYERS = 8
"""So few bars would be too broad over the whole width."""

SLOT, BAR, GAP = 10.0, 3.8, 0.4
HEIGHT = 100.0

Part = Mapping[str, Any]


def pair(a: float | None, b: float | None) -> Html:
    """Two bars, before above after, the longer one full; the figures stand in the table beside it."""
    most = max(a or 0.0, b or 0.0)
    scale = 100 / most if 0 < most < float("inf") else 0.0
    bars = [
        tag("rect", x=0, y=y, width=f"{min(100.0, (value or 0.0) * scale):.2f}", height=5, class_=f"bar {model}")
        for model, y, value in (("a", 1, a), ("b", 8, b))
    ]
    return tag("svg", bars, class_="pair", viewBox="0 0 100 14", preserveAspectRatio="none", aria_hidden="true")


def by_layer(graph: str, a: Sequence[Part], b: Sequence[Part], output: int | None = None) -> Html | None:
    """FLOPs of each layer of one graph, streams stacked, A beside B; None where nothing is computed.

    output: the layer number of what comes after the layers.
    """
    sides = {"a": _expanded(a), "b": _expanded(b)}
    layers = sorted({layer for side in sides.values() for layer, _ in side})
    if not layers:
        return None
    first, last = layers[0], layers[-1]
    if last - first >= MOST_LAYERS:
        return tag("p", f"{graph}: {last - first + 1} layers are too many to draw.", class_="quiet")
    totals = [sum(side.get((layer, s), 0.0) for s in STREAMS) for side in sides.values() for layer in layers]
    most = max(totals)
    streams = [s for s in STREAMS if any(stream == s for side in sides.values() for _, stream in side)]
    bars = [
        bar
        for layer in layers
        for place, (model, side) in enumerate(sides.items())
        for bar in _stack(layer, (layer - first) * SLOT + GAP + place * (BAR + GAP + GAP), model, side, most, output)
    ]
    width = (last - first + 1) * SLOT
    lines = [tag("line", x1=0, x2=width, y1=y, y2=y, class_="grid") for y in (0, 50, 100)]
    figure = tag(
        "svg",
        lines,
        bars,
        class_="layers",
        viewBox=f"0 0 {width:g} {HEIGHT:g}",
        preserveAspectRatio="none",
        role="img",
        aria_label=f"{graph}: FLOPs by layer, before and after; the figures are in the table below",
    )
    return tag(
        "figure",
        tag("h3", graph),
        tag("p", f"FLOPs a layer; the top line is {count(most)}", class_="quiet"),
        figure,
        tag(
            "div",
            tag("span", layers_text((first, first), output)),
            tag("span", layers_text((last, last), output)),
            class_="axis",
        ),
        _legend(streams),
        _table(graph, a, b, output),
        class_="chart few" if last - first < FEW_LAYERS else "chart",
    )


def _expanded(parts: Iterable[Part]) -> dict[tuple[int, str], float]:
    """(layer, stream) -> FLOPs, of parts that compute anything; streams that are not known count as `none`."""
    found: dict[tuple[int, str], float] = {}
    for part in parts:
        flops, (first, last) = number(part.get("flops")) or 0.0, part["layers"]
        if not 0 < flops < MOST_FLOPS:
            continue
        stream = part["stream"] if part["stream"] in STREAMS else "none"
        # The ends are enough to see that there are too many.
        for layer in range(first, last + 1) if last - first < MOST_LAYERS else (first, last):
            found[layer, stream] = found.get((layer, stream), 0.0) + flops
    return found


def _stack(
    layer: int, x: float, model: str, side: Mapping[tuple[int, str], float], most: float, output: int | None
) -> list[Html]:
    bars, top = [], HEIGHT
    for stream in STREAMS:
        flops = side.get((layer, stream), 0.0)
        if flops:
            height = HEIGHT * flops / most
            top -= height
            title = tag(
                "title", f"{layers_text((layer, layer), output)}, {model.upper()}, {stream}: {count(flops)}FLOPs"
            )
            shape = f"M{x:g} {top:.2f}h{BAR:g}v{height:.2f}h-{BAR:g}z"
            bars.append(tag("path", title, d=shape, class_=f"bar {model} {stream}"))
    return bars


def _legend(streams: Sequence[str]) -> Html:
    entries = [
        tag(
            "li",
            tag(
                "svg",
                tag("rect", width=10, height=10, class_=f"bar {model} {stream}"),
                viewBox="0 0 10 10",
                aria_hidden="true",
            ),
            f"{word} {stream}" if stream != "none" else word,
        )
        for model, word in (("a", "before"), ("b", "after"))
        for stream in streams
    ]
    return tag("ul", entries, class_="legend")


def _table(graph: str, a: Sequence[Part], b: Sequence[Part], output: int | None) -> Html:
    rows = [
        tag(
            "tr",
            tag("td", word),
            tag("td", layers_text(part["layers"], output)),
            tag("td", part["stream"]),
            tag("td", _figure(part, "flops", count), class_="num"),
            tag("td", _figure(part, "bytes", size), class_="num"),
            tag("td", _figure(part, "time_s", duration), class_="num"),
        )
        for word, parts in (("before", a), ("after", b))
        for part in parts
    ]
    head = tag("tr", *(tag("th", word, scope="col") for word in ("", "layers", "stream", "FLOPs", "bytes", "time")))
    return tag(
        "details",
        tag("summary", f"Figures of {graph} by layer"),
        tag(
            "div",
            tag("table", tag("thead", head), tag("tbody", rows)),
            class_="wide",
            tabindex=0,
            role="region",
            aria_label=f"Figures of {graph}",
        ),
    )


def _figure(part: Part, key: str, show: Any) -> str:
    value = number(part.get(key))
    return "" if value is None else str(show(value))
