"""Keep the visual tokens that the last text token looks at most, from a layer on.

    before                                after
    layer `layer` reads h.visual [Nv]     s = attention row of the last text token in layer - 1, summed over heads
                                          layer `layer` reads h.visual [floor(keep * Nv)], best s, old order

The row is exact: softmax over every key the token sees, and only that one row is computed. An approximation:
FastV (arXiv 2403.06764, section 4), as its in-place variant does it: positions are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from foveate.errors import PassError
from foveate.ir.attention import attentions, looks_at_visual
from foveate.ir.program import NodeInfo
from foveate.ir.rewriter import Rewriter
from foveate.passes.base import whole
from foveate.passes.select.rows import last_row
from foveate.passes.select.selector import Selection


@dataclass(frozen=True)
class FastV(Selection):
    """Before `layer`, floor(keep * n) of the n visual tokens that reach it stay.

    layer: 1 to the last; keep: above 0, up to 1. Scores come from `layer - 1`, mean over its heads.
    """

    name: ClassVar[str] = "fastv"
    source: ClassVar[str] = "FastV, arXiv 2403.06764"
    first: ClassVar[int] = 1

    def __post_init__(self) -> None:
        self.require(whole(self.layer) and self.layer >= 1, "layer", "1 or more: scores come from the layer before")
        super().__post_init__()

    def scores(self, edit: Rewriter, about: NodeInfo) -> fx.Node:
        """The attention row of the last text token in the layer before."""
        rows = [n for n in attentions(edit.graph, self.layer - 1, "text") if looks_at_visual(n)]
        if not rows:
            raise PassError(
                f"{self.name}: no head of layer {self.layer - 1} looks at visual tokens, so there is no score"
            )
        return last_row(edit, rows[0], about)

    def how(self) -> str:
        """By the row."""
        return "by the last text token's attention"
