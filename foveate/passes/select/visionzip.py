"""Keep the patches that the CLS token looks at most, and merge the others into a few.

    before                              after
    projector reads features [I, N]     dominant   = CLS, and the patches with the best CLS row, in their old order
                                        contextual = every s-th of the others + the mean of those most alike to it
                                        projector reads dominant, contextual

VisionZip (arXiv 2412.04467, section 3.2; the sum is that of its code). Likeness is the cosine of keys, mean over heads,
in the layer that the features come from; positions are numbered anew. In a tower without CLS, its row is what all
patches pay, their mean. A CLS token that is no token of its own, as where tokens are squares of patches, is not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from foveate import ops
from foveate.errors import PassError
from foveate.ir.rewriter import Rewriter
from foveate.ir.vision import Tower, aten
from foveate.passes.base import Pass, count_of
from foveate.passes.select.vision import kept_text


@dataclass(frozen=True)
class VisionZip(Pass):
    """An image becomes `dominant` tokens, the CLS token among them if it can be one, and `contextual` ones.

    Both: a number, or a share of an image's tokens. The paper's pairs are 54 and 10, 108 and 20, 162 and 30.
    """

    name: ClassVar[str] = "visionzip"
    source: ClassVar[str] = "VisionZip, arXiv 2412.04467"
    graph: ClassVar[str] = "vision"

    dominant: int | float = 54
    contextual: int | float = 10

    def __post_init__(self) -> None:
        self.require_count_or_share("dominant", "a number of tokens")
        self.require_count_or_share("contextual", "a number of tokens")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        tower = Tower(edit, self.name)
        tower.check_moves()
        tower.check_whole()
        whole = edit.program.info.tokens_per_image
        dominant, contextual = count_of(self.dominant, whole), count_of(self.contextual, whole)
        if dominant < 1 or dominant + contextual > whole:
            raise PassError(
                f"{self.name}: dominant={dominant} and contextual={contextual} do not fit an image of {whole} tokens: "
                f"dominant is at least 1; together they are at most {whole}"
            )
        with edit.before(tower.end):
            query, key, scale = tower.heads()
            metric = tower.metric(tower.call(aten.mean.dim, key, [1]))
            first = tower.cls
            chosen = tower.call(
                ops.visionzip, tower.row(query, key, scale), metric, dominant - (first is not None), contextual
            )
            weights, source = (edit.item(chosen, place, tower.about()) for place in (0, 1))
            tower.merge(weights, source, first=first)
        yield f"in the vision tower: {kept_text(edit)} visual tokens an image go to the decoder, {contextual} merged"
