"""Keep visual tokens at random, from a layer on: the baseline that every comparison needs.

    before                                after
    layer `layer` reads h.visual [Nv]     s = hash(seed, place of the token)
                                          layer `layer` reads h.visual [floor(keep * Nv)], best s, old order

The choice depends on the seed and the token's place only, so it is the same on every device and in every batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from foveate import ops
from foveate.ir.program import NodeInfo
from foveate.ir.rewriter import Rewriter
from foveate.ir.select import first_of_layer, keep_tokens, live_into, visual_order_at
from foveate.passes.base import Pass, number, whole
from foveate.passes.fastv import check_selection


@dataclass(frozen=True)
class RandomPrune(Pass):
    """Before `layer`, floor(keep * n) of the n visual tokens that reach it stay, chosen by `seed`.

    layer: any; keep: above 0, up to 1; seed: 0 to 2**31 - 1.
    """

    name: ClassVar[str] = "random-prune"
    source: ClassVar[str] = "baseline; see UniPruneBench for why it must stand in every table"

    layer: int = 2
    keep: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        self.require(whole(self.layer) and self.layer >= 0, "layer", "a layer number, 0 or more")
        self.require(number(self.keep) and 0 < self.keep <= 1, "keep", "above 0, at most 1")
        self.require(whole(self.seed) and 0 <= self.seed < 2**31, "seed", "0 to 2**31 - 1")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        graph = edit.graph
        self.require_layer(edit.program, "layer")
        check_selection(self.name, edit, self.layer, self.keep)
        live = live_into(graph, self.layer)
        about = NodeInfo(self.layer, "select", "visual", self.name)
        with edit.before(first_of_layer(graph, self.layer)):
            scores = edit.call(ops.random_scores, visual_order_at(graph, self.layer), self.seed, about=about)
        keep_tokens(edit, self.layer, scores, float(self.keep), live)
        yield f"before layer {self.layer}: floor({self.keep} x visual tokens) kept at random, seed {self.seed}"
