"""Keep the visual embeddings that differ most from one another, before the decoder sees any.

    before                                   after
    the decoder reads visual [B, Nv, D]      s = max-min picks by 1 - cosine, in each image apart
                                             the decoder reads visual [B, floor(keep * Nv), D], in their old order

DivPrune (arXiv 2503.02175, algorithm 1). Positions are numbered anew, as there; `positions=keep` leaves the gaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from foveate import ops
from foveate.errors import PassError
from foveate.ir.program import NodeInfo
from foveate.ir.rewriter import Rewriter, shape
from foveate.ir.select import coords_at, first_of_layer, keep_tokens, live_inputs, renumber, visual_order_at
from foveate.passes.base import Pass
from foveate.passes.select.selector import check_selection

POSITIONS = ("renumber", "keep")


@dataclass(frozen=True)
class DivPrune(Pass):
    """Before layer 0, floor(keep * n) of the n visual tokens stay.

    keep: above 0, up to 1. positions: `renumber` closes the gaps that removed tokens leave, `keep` does not.
    """

    name: ClassVar[str] = "divprune"
    source: ClassVar[str] = "DivPrune, arXiv 2503.02175"

    keep: float = 0.25
    positions: str = "renumber"

    def __post_init__(self) -> None:
        self.require_share("keep")
        self.require(self.positions in POSITIONS, "positions", " or ".join(POSITIONS))

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        graph = edit.graph
        check_selection(self.name, edit, 0, self.keep)
        inputs = {n.name: n for n in graph.nodes if n.op == "placeholder"}
        if self.positions == "renumber" and len(shape(inputs["visual_position_ids"])) > 2:
            raise PassError(f"{self.name}: positions of several rows (M-RoPE) cannot be numbered anew; positions=keep")
        live, whole = live_inputs(graph), visual_order_at(graph, 0)
        about = NodeInfo(0, "select", "visual", self.name)
        coords = coords_at(edit, whole)
        with edit.before(first_of_layer(graph, -1)):
            scores = edit.call(ops.diverse_scores, inputs["visual"], whole, coords, float(self.keep), about=about)
        kept = keep_tokens(edit, 0, scores, float(self.keep), live)
        if self.positions == "renumber":
            renumber(edit, whole, kept)
        kept_text = f"floor({self.keep} x visual tokens) kept, those that differ most"
        yield f"before layer 0: {kept_text}; positions: {self.positions}"
