"""What every selection of visual tokens shares: where, by which score, and how many.

    before                                after
    layer `layer` reads h.visual [Nv]     s = score of each token that reaches the layer, [B, Nv] fp32
                                          layer `layer` reads h.visual [floor(keep * Nv)], best s, old order

A method says how its score is computed; ties go to the lower index.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from foveate.errors import PassError
from foveate.ir.program import NodeInfo, outputs
from foveate.ir.rewriter import Rewriter
from foveate.ir.select import first_of_layer, keep_tokens, live_into
from foveate.passes.base import Pass, Skipped, first_blind_layer, whole


@dataclass(frozen=True)
class Selection(Pass):
    """Before `layer`, floor(keep * n) of the n visual tokens that reach it stay; keep: above 0, up to 1."""

    first: ClassVar[int] = 0
    """The first layer before which the score is known."""

    layer: int = 2
    keep: float = 0.5

    def __post_init__(self) -> None:
        self.require(whole(self.layer) and self.layer >= 0, "layer", "a layer number, 0 or more")
        self.require_share("keep")

    @abstractmethod
    def scores(self, edit: Rewriter, about: NodeInfo) -> fx.Node:
        """Insert what computes the score of each token that reaches the layer: fp32 [B, n]."""

    @abstractmethod
    def how(self) -> str:
        """By what tokens are kept, for the report."""

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        check_removes(self.keep)
        graph = edit.graph
        self.require_layer(edit.program, "layer", first=self.first)
        check_selection(self.name, edit, self.layer)
        live = live_into(graph, self.layer)
        with edit.before(first_of_layer(graph, self.layer)):
            scores = self.scores(edit, NodeInfo(self.layer, "select", "visual", self.name))
        keep_tokens(edit, self.layer, scores, float(self.keep), live)
        yield f"before layer {self.layer}: floor({self.keep} x visual tokens) kept {self.how()}"


def check_removes(keep: float) -> None:
    """Raise Skipped where a share keeps everything."""
    if keep == 1:
        raise Skipped("keep=1 keeps every visual token")


def check_selection(name: str, edit: Rewriter, layer: int) -> None:
    """Raise PassError where tokens cannot be selected before `layer`."""
    blind = first_blind_layer(edit.graph)
    if layer >= blind:
        raise PassError(
            f"{name}: the visual branch is cut at layer {blind}; tokens can be selected before it, not before "
            f"layer {layer}"
        )
    if str(layer) in outputs(edit.graph)["kept"]:
        raise PassError(f"{name}: tokens are already selected before layer {layer}; give another layer")
