"""Average visual tokens over squares of the image: a baseline that looks at nothing.

before                                     after
projector reads features [I, h * w, C]     projector reads their means over factor x factor patches
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from foveate.errors import PassError
from foveate.ir.rewriter import Rewriter
from foveate.ir.vision import Tower, aten
from foveate.passes.base import Pass, Skipped, whole
from foveate.passes.select.vision import kept_text


@dataclass(frozen=True)
class AveragePool(Pass):
    """Each `factor` x `factor` patches become one visual token; factor: divides the rows and columns of the grid."""

    name: ClassVar[str] = "average-pool"
    source: ClassVar[str] = "baseline: average pooling"
    graph: ClassVar[str] = "vision"

    factor: int = 2

    def __post_init__(self) -> None:
        self.require(whole(self.factor) and self.factor >= 1, "factor", "a number of patches, 1 or more")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        tower = Tower(edit, self.name)
        tower.check_moves()
        tower.check_whole()
        height, width = edit.program.info.grid
        if height % self.factor or width % self.factor:
            raise PassError(f"{self.name}: factor={self.factor} does not divide a grid of {height} x {width} patches")
        if self.factor == 1:
            raise Skipped("factor=1 leaves every token as it is")
        with edit.before(tower.end):
            pooled = tower.call(aten.mean.dim, self._squares(tower, tower.tokens), [2, 4])
            corners = self._squares(tower, tower.places())
            for axis in (4, 2):
                corners = tower.call(aten.select.int, corners, axis, 0)
            flat = [tower.call(aten.flatten.using_ints, x, 1, 2) for x in (pooled, corners)]
            tower.become(*flat)
        yield f"in the vision tower: {kept_text(edit)} visual tokens an image go to the decoder, means of squares"

    def _squares(self, tower: Tower, x: fx.Node) -> fx.Node:
        """[I, h * w, ...] as [I, h / factor, factor, w / factor, factor, ...]."""
        height, width = tower.edit.program.info.grid
        sizes = [height // self.factor, self.factor, width // self.factor, self.factor]
        return tower.call(aten.unflatten.int, x, 1, sizes)
