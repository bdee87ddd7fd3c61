"""Keep visual tokens at random, from a layer on: the baseline that every comparison needs.

    before                                after
    layer `layer` reads h.visual [Nv]     s = hash(seed, place of the token)
                                          layer `layer` reads h.visual [floor(keep * Nv)], best s, old order

The choice depends on the seed and the token's place only, so it is the same on every device and in every batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from foveate import ops
from foveate.ir.program import NodeInfo
from foveate.ir.rewriter import Rewriter
from foveate.ir.select import visual_order_at
from foveate.passes.base import whole
from foveate.passes.select.selector import Selection


@dataclass(frozen=True)
class RandomPrune(Selection):
    """Before `layer`, floor(keep * n) of the n visual tokens that reach it stay, chosen by `seed`.

    layer: any; keep: above 0, up to 1; seed: 0 to 2**31 - 1.
    """

    name: ClassVar[str] = "random-prune"
    source: ClassVar[str] = "baseline; see UniPruneBench for why it must stand in every table"

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(whole(self.seed) and 0 <= self.seed < 2**31, "seed", "0 to 2**31 - 1")

    def scores(self, edit: Rewriter, about: NodeInfo) -> fx.Node:
        """A hash."""
        return edit.call(ops.random_scores, visual_order_at(edit.graph, self.layer), self.seed, about=about)

    def how(self) -> str:
        """By the seed."""
        return f"at random, seed {self.seed}"
