"""What every selection in the vision tower shares: the tokens that go stand nowhere, and positions close over them.

    before                              after
    projector reads features [I, N]     s = score of each patch, [I, N] fp32
                                        projector reads features [I, floor(keep * N)], best s, old order

Images are selected from apart. The decoder never sees what is gone, and generation goes on behind the shorter prompt.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from foveate.errors import PassError
from foveate.ir.packed import keep_in_segments
from foveate.ir.rewriter import Rewriter
from foveate.ir.vision import Tower
from foveate.passes.base import Pass
from foveate.passes.select.selector import check_removes


@dataclass(frozen=True)
class VisionSelection(Pass):
    """floor(keep * n) of an image's n visual tokens go to the projector; keep: above 0, up to 1."""

    graph: ClassVar[str] = "vision"
    projected: ClassVar[bool] = False
    """Whether tokens are selected behind the projector, not before it."""

    keep: float = 0.25

    def __post_init__(self) -> None:
        self.require_share("keep")

    @abstractmethod
    def scores(self, tower: Tower) -> fx.Node:
        """Insert what computes the score of each token that is left: fp32 [I, n]."""

    def by_segment(self) -> tuple[str, float]:
        """The rule of `foveate::segment_tokens`, and its share, for towers whose images stand in one sequence."""
        raise PassError(
            f"{self.name}: it does not say how it scores tokens in a tower that takes all images as one sequence"
        )

    @abstractmethod
    def how(self) -> str:
        """By what tokens are kept, for the report."""

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        check_removes(self.keep)
        if edit.program.info.tower == "packed":
            yield from keep_in_segments(edit, self.name, *self.by_segment(), float(self.keep), self.how())
            return
        tower = Tower(edit, self.name, self.projected)
        with edit.before(tower.end):
            tower.keep(self.scores(tower), float(self.keep))
        yield f"in the vision tower: {kept_text(edit)} visual tokens an image go to the decoder, {self.how()}"


def kept_text(edit: Rewriter) -> str:
    """How many tokens of how many an image is left with."""
    return f"{edit.program.tokens_left} of {edit.program.info.tokens_per_image}"
