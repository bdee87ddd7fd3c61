"""Keep the visual tokens that are least alike to a few pivots, so that no two say the same.

    before                                after
    layer `layer` reads h.visual [Nv]     pivots = largest keys in layer - 1, of the image and of the text behind it
                                          s = picks by the lowest cosine of norm(h) to each pivot in turn
                                          layer `layer` reads h.visual [floor(keep * Nv)], best s, old order

DART (arXiv 2502.11494, section 3). Its code keeps the visual pivots and 8 equal parts, 132 tokens for a budget of 128;
here the count is exact, and the first pivots take one token more where it cannot be shared out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from foveate import ops
from foveate.errors import PassError
from foveate.ir.attention import Attention, attentions, looks_at_visual
from foveate.ir.program import NodeInfo, Stream
from foveate.ir.rewriter import Rewriter
from foveate.ir.select import hidden_into, visual_order_at
from foveate.passes.base import whole
from foveate.passes.select.selector import Selection

aten = torch.ops.aten


@dataclass(frozen=True)
class DART(Selection):
    """Before `layer`, floor(keep * n) of the n visual tokens that reach it stay.

    layer: 1 to the last; keep: above 0, up to 1; pivots: of the image, and as many of the text.
    """

    name: ClassVar[str] = "dart"
    source: ClassVar[str] = "DART, arXiv 2502.11494"
    first: ClassVar[int] = 1

    pivots: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(whole(self.pivots) and self.pivots >= 1, "pivots", "a number of tokens, 1 or more")

    def scores(self, edit: Rewriter, about: NodeInfo) -> fx.Node:
        """Picks."""
        graph, before = edit.graph, self.layer - 1
        rows = [n for n in attentions(graph, before, "text") if looks_at_visual(n)]
        if not rows:
            raise PassError(f"{self.name}: no head of layer {before} looks at visual tokens, so there are no keys")
        seen = Attention.of(rows[0])
        orders = [visual_order_at(graph, self.layer), seen.k_order[1]]
        if edit.program.info.norm_offset:
            raise PassError(
                f"{self.name}: the norms of {edit.program.info.family} add {edit.program.info.norm_offset:g} to their "
                f"weights, which {self.name} does not know"
            )
        # Of the model's last norm only its weight turns a direction.
        weight = edit.weight(edit.program.info.paths["norm"])
        streams: list[fx.Node] = []
        names: tuple[Stream, Stream] = ("visual", "text")
        for key, order, stream in zip(seen.k[:2], orders, names, strict=True):
            hidden = hidden_into(edit, self.layer, stream)
            x = edit.call(aten.mul.Tensor, hidden, weight, about=about.with_(stream=stream))
            streams += [key, x, order]
        return edit.call(ops.dart_scores, *streams, float(self.keep), self.pivots, about=about)

    def how(self) -> str:
        """By the picks."""
        return f"by difference from {2 * self.pivots} pivots"
