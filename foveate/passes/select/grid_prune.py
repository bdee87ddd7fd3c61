"""Keep visual tokens that lie evenly over each image, from a layer on: a baseline that looks at nothing.

    before                                after
    layer `layer` reads h.visual [Nv]     s = digits of row and column, lowest first
                                          layer `layer` reads h.visual [floor(keep * Nv)], best s, old order

A quarter of the tokens is every second row and column, half of them a checkerboard; any other share is spread as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from foveate import ops
from foveate.ir.program import NodeInfo
from foveate.ir.rewriter import Rewriter
from foveate.ir.select import coords_at, visual_order_at
from foveate.passes.select.selector import Selection


@dataclass(frozen=True)
class GridPrune(Selection):
    """Before `layer`, floor(keep * n) of the n visual tokens that reach it stay, spread over their images.

    layer: any; keep: above 0, up to 1.
    """

    name: ClassVar[str] = "grid-prune"
    source: ClassVar[str] = "baseline: a uniform grid"

    def scores(self, edit: Rewriter, about: NodeInfo) -> fx.Node:
        """Places on the grid."""
        coords = coords_at(edit, visual_order_at(edit.graph, self.layer))
        return edit.call(ops.grid_scores, coords, about=about)

    def how(self) -> str:
        """By the grid."""
        return "evenly over each image"
