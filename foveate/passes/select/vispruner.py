"""Keep the patches that the CLS token looks at most, and of the others those that are least alike.

    before                              after
    projector reads features [I, N]     s = 1 for half of the tokens by the CLS row, and for what is left of the others
                                        when the most alike have gone, 8 a round; projector reads those [I, keep * N]

VisPruner (arXiv 2412.01818, section 3; rounds of 8 as in its code). Positions are numbered anew. In a
tower without CLS, its row is what all patches pay, their mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from foveate import ops
from foveate.ir.vision import Tower
from foveate.passes.base import number
from foveate.passes.select.vision import VisionSelection


@dataclass(frozen=True)
class VisPruner(VisionSelection):
    """floor(keep * n) of an image's n visual tokens stay; keep: above 0, up to 1.

    important: the share of them that is chosen by the CLS row, 0 to 1.
    """

    name: ClassVar[str] = "vispruner"
    source: ClassVar[str] = "VisPruner, arXiv 2412.01818"

    important: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(number(self.important) and 0 <= self.important <= 1, "important", "0 to 1")

    def scores(self, tower: Tower) -> fx.Node:
        """The row, and likeness."""
        row = tower.left(tower.row(*tower.heads()))
        return tower.call(ops.distinct_scores, row, tower.tokens, float(self.keep), float(self.important))

    def by_segment(self) -> tuple[str, float]:
        """The same in each segment."""
        return "distinct", float(self.important)

    def how(self) -> str:
        """By both."""
        return "by the tower's attention and by difference"
