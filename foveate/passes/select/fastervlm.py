"""Keep the patches that the vision tower's own CLS token looks at most.

    before                              after
    projector reads features [I, N]     s = row of the CLS token in the last layer that features come from
                                        projector reads features [I, floor(keep * N)], best s, old order

FasterVLM (arXiv 2412.01818, section 3.2): heads weigh the same, positions are numbered anew. In a tower without CLS, s
is what all patches pay, their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from foveate.ir.vision import Tower
from foveate.passes.select.vision import VisionSelection


@dataclass(frozen=True)
class FasterVLM(VisionSelection):
    """floor(keep * n) of an image's n visual tokens stay; keep: above 0, up to 1."""

    name: ClassVar[str] = "fastervlm"
    source: ClassVar[str] = "FasterVLM, arXiv 2412.01818"

    def scores(self, tower: Tower) -> fx.Node:
        """The row."""
        return tower.left(tower.row(*tower.heads()))

    def by_segment(self) -> tuple[str, float]:
        """The same in each segment."""
        return "row", 0.0

    def how(self) -> str:
        """By the row."""
        return "those that get most of the tower's attention"
