"""Merge the tokens that are most alike, some in each layer of the vision tower, which works on fewer and fewer.

    before                                  after
    h = x + attention(norm(x))  [I, n, C]   a_i, b_j = mean over heads of the keys of tokens at even and odd places
    x' = h + mlp(norm(h))       [I, n, C]   h = those r of a that are most alike to a b join it; [I, n - r, C]
                                            the next layers' logits + log(how many patches a key stands for)

ToMe (arXiv 2210.09461, section 3). CLS joins none and none joins it. In the tower tokens stand as in ToMe's code, since
that decides who may join whom; the decoder gets them in the order of the image, which its positions were trained for,
unless `sort` is false.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from foveate import ops
from foveate.ir.rewriter import Rewriter
from foveate.ir.tower_layers import Merger, layers_of
from foveate.ir.vision import Tower
from foveate.passes.base import Pass, Skipped, count_of
from foveate.passes.select.vision import kept_text

SCHEDULES = ("constant", "decreasing")


@dataclass(frozen=True)
class ToMe(Pass):
    """In each layer `merge` tokens are merged away, at most half of those there are.

    merge: a number, or a share of an image's tokens for all layers together. schedule: `constant`, or `decreasing`,
    twice as many in the first layer and none in the last; both merge as many in all. proportional: a merged token
    counts in attention as the patches it stands for. sort: the decoder gets tokens in the order of the image.
    """

    name: ClassVar[str] = "tome"
    source: ClassVar[str] = "ToMe, arXiv 2210.09461"
    graph: ClassVar[str] = "vision"

    merge: int | float = 16
    schedule: str = "constant"
    proportional: bool = True
    sort: bool = True

    def __post_init__(self) -> None:
        self.require_count_or_share("merge", "a number of tokens a layer")
        self.require(self.schedule in SCHEDULES, "schedule", " or ".join(SCHEDULES))
        for option in ("proportional", "sort"):
            self.require(isinstance(getattr(self, option), bool), option, "true or false")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        tower = Tower(edit, self.name)
        layers = layers_of(tower)
        whole = edit.program.info.tokens_per_image
        going = merges(self.merge, whole, len(layers), self.schedule)
        if not any(going):
            raise Skipped(f"merge={self.merge} merges no token of {whole} in {len(layers)} layers")
        last = max(number for number, merge in enumerate(going) if merge)
        merger = Merger(tower, layers)
        for number, (layer, merge) in enumerate(zip(layers, going, strict=True)):
            if self.proportional:
                merger.weigh(layer)
            if merge:
                with edit.after(layer.residual):
                    sort = self.sort and number == last
                    matched = merger.call(layer, ops.tome, layer.keys, merger.size, merger.source, merge, sort)
                merger.merge(layer, matched, merge)
        merger.finish()
        yield f"in the vision tower: {kept_text(edit)} visual tokens an image are left, {sum(going)} merged on the way"


def merges(merge: float, tokens: int, layers: int, schedule: str = "constant") -> list[int]:
    """How many of an image's tokens each layer merges: at most half of those that it has.

    merge: a number a layer, or a share of all; sums over layers are rounded down, so that nothing gets lost.
    """
    total = count_of(merge, tokens) * (1 if isinstance(merge, float) else layers)
    parts = [layers - 1 - n if schedule == "decreasing" and layers > 1 else 1 for n in range(layers)]
    ends = [total * sum(parts[:n]) // sum(parts) for n in range(layers + 1)]
    found: list[int] = []
    for before, after in itertools.pairwise(ends):
        found.append(min(after - before, (tokens - sum(found)) // 2))
    return found
