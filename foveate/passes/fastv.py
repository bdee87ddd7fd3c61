"""Keep the visual tokens that the last text token looks at most, from a layer on.

    before                                after
    layer `layer` reads h.visual [Nv]     s = attention row of the last text token in layer - 1, summed over heads
                                          layer `layer` reads h.visual [floor(keep * Nv)], best s, old order

The row is exact: softmax over every key the token sees, and only that one row is computed. An approximation:
FastV (arXiv 2403.06764, section 4), as its in-place variant does it: positions are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch

from foveate import ops
from foveate.errors import PassError
from foveate.ir.attention import Attention, attentions, looks_at_visual
from foveate.ir.program import NodeInfo, outputs
from foveate.ir.rewriter import Rewriter
from foveate.ir.select import first_of_layer, keep_tokens, live_into
from foveate.ir.tail import END
from foveate.passes.base import Pass, Skipped, first_blind_layer, number, whole

aten = torch.ops.aten


@dataclass(frozen=True)
class FastV(Pass):
    """Before `layer`, floor(keep * n) of the n visual tokens that reach it stay.

    layer: 1 to the last; keep: above 0, up to 1. Scores come from `layer - 1`, mean over its heads.
    """

    name: ClassVar[str] = "fastv"
    source: ClassVar[str] = "FastV, arXiv 2403.06764"

    layer: int = 2
    keep: float = 0.5

    def __post_init__(self) -> None:
        self.require(whole(self.layer) and self.layer >= 1, "layer", "1 or more: scores come from the layer before")
        self.require(number(self.keep) and 0 < self.keep <= 1, "keep", "above 0, at most 1")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        graph = edit.graph
        self.require_layer(edit.program, "layer", first=1)
        check_selection(self.name, edit, self.layer, self.keep)
        rows = [n for n in attentions(graph, self.layer - 1, "text") if looks_at_visual(n)]
        if not rows:
            raise PassError(
                f"{self.name}: no head of layer {self.layer - 1} looks at visual tokens, so there is no score"
            )
        scored = Attention.of(rows[0])
        live = live_into(graph, self.layer)
        about = NodeInfo(self.layer, "select", "visual", self.name)
        with edit.before(first_of_layer(graph, self.layer)):
            last = about.with_(stream="text")
            query = edit.call(aten.slice.Tensor, scored.q[0], 2, -1, END, about=last)
            order = edit.call(aten.slice.Tensor, scored.q_order[0], 1, -1, END, about=last)
            row = edit.call(ops.attention_row, query, scored.k, order, scored.k_order, scored.scale, about=about)
            # A sum ranks as the mean over all heads does; heads that do not see the image add nothing.
            scores = edit.call(aten.sum.dim_IntList, row, [1, 2], about=about)
        keep_tokens(edit, self.layer, scores, float(self.keep), live)
        yield f"before layer {self.layer}: floor({self.keep} x visual tokens) kept by the last text token's attention"


def check_selection(name: str, edit: Rewriter, layer: int, keep: float) -> None:
    """Raise PassError or Skipped where a selection before `layer` makes no sense."""
    blind = first_blind_layer(edit.graph)
    if layer >= blind:
        raise PassError(
            f"{name}: the visual branch is cut at layer {blind}; tokens can be selected before it, not before "
            f"layer {layer}"
        )
    if str(layer) in outputs(edit.graph)["kept"]:
        raise PassError(f"{name}: tokens are already selected before layer {layer}; give another layer")
    if keep == 1:
        raise Skipped("keep=1 keeps every visual token")
