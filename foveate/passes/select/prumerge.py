"""Keep the patches that stand out for the CLS token, and fold the others into them.

    before                              after
    projector reads features [I, N]     a = row of the CLS token in the tower's next layer, heads taken together
                                        kept = outliers of a by the interquartile range, by falling a
                                        projector reads kept + sum of a * their 32 most alike, and sum of a * the rest

PruMerge and PruMerge+ (arXiv 2403.15388, section 3), as its code does them: queries and keys are those of the layer
that follows the features, weights are not normalised, and tokens stand in the order of their score. In a tower without
CLS, its row is what all patches pay, their mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from foveate import ops
from foveate.errors import PassError
from foveate.ir.rewriter import Rewriter
from foveate.ir.vision import Tower, aten
from foveate.passes.base import Pass, whole
from foveate.passes.select.vision import kept_text


@dataclass(frozen=True)
class PruMerge(Pass):
    """An image becomes as many tokens as stand out, and one for the rest.

    keep: a share, for floor(keep * n) tokens of every image instead. plus: a uniform sample of the image as well (with
    a `keep`, half of the tokens). neighbors: how many tokens are added to each that is kept.
    """

    name: ClassVar[str] = "prumerge"
    source: ClassVar[str] = "PruMerge and PruMerge+, arXiv 2403.15388"
    graph: ClassVar[str] = "vision"

    keep: float | None = None
    plus: bool = False
    neighbors: int = 32

    def __post_init__(self) -> None:
        if self.keep is not None:
            self.require_share("keep")
        self.require(isinstance(self.plus, bool), "plus", "true or false")
        self.require(whole(self.neighbors) and self.neighbors >= 0, "neighbors", "a number of tokens, 0 or more")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        tower = Tower(edit, self.name)
        tower.check_moves()
        tower.check_whole()
        if self.keep is not None and int(self.keep * edit.program.info.tokens_per_image) < 1:
            raise PassError(f"{self.name}: keep={self.keep} leaves an image no token, not even the one for the rest")
        with edit.before(tower.end):
            query, key, scale = tower.next_layer()
            metric = tower.metric(tower.call(aten.select.int, key, 1, 0))
            keep = None if self.keep is None else float(self.keep)
            chosen = tower.call(ops.prumerge, tower.row(query, key, scale), metric, keep, self.plus, self.neighbors)
            weights, source, count = (edit.item(chosen, place, tower.about()) for place in range(3))
            tower.merge(weights, source, count if keep is None else None)
        many = "as many visual tokens as stand out" if keep is None else f"{kept_text(edit)} visual tokens an image"
        yield f"in the vision tower: {many} go to the decoder, the others are merged into them"
