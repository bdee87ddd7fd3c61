"""Pictures of statistics, for any model: YOPO's figures 2, 3 and 5 (arXiv 2410.06169), and their data.

distance: attention between two visual tokens by how far apart they are, a line a layer. layers: how much of its
attention a text token behind the image pays to it, layer by layer. heads: activity of every head.
"""

from __future__ import annotations

import io
from typing import Any

from foveate.ir.statistics import Statistics
from foveate.report.plot import INK, check_matplotlib

FIGURES = ("distance", "layers", "heads")


def figure_data(found: Statistics) -> dict[str, Any]:
    """What the figures show, fit for JSON.

    distance: `weights` [layers][distances], mean over heads and pairs of tokens; `within` [layers][distances], share of
    attention among visual tokens that lies within each distance. layers: `mean`, `least` and `most` over heads of the
    share of attention from text to image, each [layers]. heads: means of `mass` and `output` [layers][heads].
    """
    far = [d for d, count in enumerate(found.pairs.tolist()) if count]
    reached = found.by_distance.sum(1)
    shares = found.text_to_visual / found.samples
    return {
        "samples": found.samples,
        "model": found.model,
        "source": found.source,
        "distance": {
            "distances": far,
            "weights": found.attention_at().mean(1)[:, far].tolist(),
            "within": (reached.cumsum(1) / reached.sum(1, keepdim=True))[:, far].tolist(),
        },
        "layers": {
            "mean": shares.mean(1).tolist(),
            "least": shares.amin(1).tolist(),
            "most": shares.amax(1).tolist(),
        },
        "heads": {rho: found.activity(rho).tolist() for rho in ("mass", "output")},
    }


def figure_png(data: dict[str, Any], name: str) -> bytes:
    """One of `FIGURES` as a PNG, from `figure_data`; FoveateError where matplotlib is not installed."""
    check_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    {"distance": _distance, "layers": _layers, "heads": _heads}[name](figure, data)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def _title(figure: Any, what: str, data: dict[str, Any]) -> None:
    model = data["source"].get("model") or data["model"]["family"]
    figure.suptitle(f"{what}\n{model}, {data['samples']} samples", fontsize=11)


def _distance(figure: Any, data: dict[str, Any]) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    shown, layers = data["distance"], data["model"]["layers"]
    axes = figure.subplots(1, 2)
    scale, colors = Normalize(0, max(layers - 1, 1)), colormaps["viridis"]
    for axis, what in zip(axes, ("weights", "within"), strict=True):
        for layer, row in enumerate(shown[what]):
            axis.plot(shown["distances"], row, color=colors(scale(layer)), linewidth=1.3, marker=".", markersize=4)
        axis.set_xlabel("distance on the image's grid, in tokens")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(True, alpha=0.25)
    axes[0].set(ylabel="mean attention weight of a pair", yscale="log")
    axes[1].set(ylabel="share of attention within that distance", ylim=(0, 1.02))
    _title(figure, "Attention between visual tokens of an image, by distance", data)
    figure.colorbar(ScalarMappable(scale, colors), ax=axes, label="decoder layer", ticks=_ticks(layers))


def _layers(figure: Any, data: dict[str, Any]) -> None:
    shown = data["layers"]
    axis = figure.subplots()
    layers = range(len(shown["mean"]))
    axis.fill_between(
        layers, shown["least"], shown["most"], color="#00798c", alpha=0.2, label="least and most of a head"
    )
    axis.plot(layers, shown["mean"], color="#00798c", marker="o", markersize=4, label="mean over heads")
    axis.set(
        xlabel="decoder layer",
        ylabel="share of attention paid to the image",
        ylim=(0, None),
        xticks=_ticks(len(layers)),
    )
    axis.grid(True, alpha=0.25)
    axis.legend(frameon=False)
    _title(figure, "What text tokens behind the image pay to it", data)


def _heads(figure: Any, data: dict[str, Any]) -> None:
    axes = figure.subplots(1, 2)
    titles = {"mass": "attention to image keys / to text keys", "output": "output norm at image / at text tokens"}
    for axis, (rho, title) in zip(axes, titles.items(), strict=True):
        values = data["heads"][rho]
        picture = axis.imshow(values, aspect="auto", cmap="magma", vmin=0, interpolation="nearest", origin="lower")
        axis.set_title(title, fontsize=10, color=INK)
        axis.set(xlabel="head", ylabel="decoder layer", xticks=_ticks(len(values[0])), yticks=_ticks(len(values)))
        figure.colorbar(picture, ax=axis, shrink=0.85)
    _title(figure, "Activity of attention heads for the image", data)


def _ticks(count: int) -> list[int]:
    """At most about ten whole numbers below `count`."""
    return list(range(0, count, max(1, -(-count // 10))))
