"""How a snapshot says things once: equal layers folded, names relative to their layer. Needs no torch."""

from __future__ import annotations

from typing import Any

PREVIOUS = "prev."
"""In front of the name of a value of the layer before."""

LAYER = "{l}"
"""In place of the number of the layer."""


def fold(layers: dict[int, Any]) -> list[tuple[list[int], Any]]:
    """Consecutive layers with equal content as ([first, last], content)."""
    folded: list[tuple[list[int], Any]] = []
    for layer, content in sorted(layers.items()):
        if folded and folded[-1][0][1] == layer - 1 and folded[-1][1] == content:
            folded[-1][0][1] = layer
        else:
            folded.append(([layer, layer], content))
    return folded
