"""Keep the visual embeddings that differ most from one another, before the decoder sees any.

    before                                 after
    projector makes out [I, N, D]          s = max-min picks by 1 - cosine
    the decoder reads out                  the decoder reads out [I, floor(keep * N), D], best s, old order

DivPrune (arXiv 2503.02175, algorithm 1), which picks round(ratio * N); positions are numbered anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from foveate import ops
from foveate.ir.vision import Tower
from foveate.passes.select.vision import VisionSelection


@dataclass(frozen=True)
class DivPrune(VisionSelection):
    """floor(keep * n) of an image's n visual tokens stay; keep: above 0, up to 1."""

    name: ClassVar[str] = "divprune"
    source: ClassVar[str] = "DivPrune, arXiv 2503.02175"
    projected: ClassVar[bool] = True

    def scores(self, tower: Tower) -> fx.Node:
        """Picks."""
        return tower.call(ops.diverse_scores, tower.tokens, float(self.keep))

    def by_segment(self) -> tuple[str, float]:
        """The same in each segment."""
        return "diverse", 0.0

    def how(self) -> str:
        """By the picks."""
        return "those that differ most"
