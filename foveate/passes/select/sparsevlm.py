"""Keep the visual tokens that the text's own visual words look at, stage by stage, and recycle some of the others.

    once                                 raters = text tokens behind the image that are most alike to visual embeddings
    before, behind each of `layers`      after
    layer l + 1 reads h.visual [n]       s = rows of the raters in layer l, mean over them and over heads
                                         layer l + 1 reads best s [floor(keep * N)], and clusters of the best that go

SparseVLM (arXiv 2410.04417, section 3), with the fixed counts of its code, or those of its text: what goes is a share
of n - rank(rows of the raters). They depend on the image, so that room is kept for all that a rank as large as the
number of text tokens would leave, and the rest is padding. Positions are kept, and a cluster stands
where its peak stood: the code numbers positions anew and puts clusters behind the tokens that stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from foveate import ops
from foveate.errors import PassError
from foveate.ir.attention import Attention, attentions, looks_at_visual
from foveate.ir.program import NodeInfo
from foveate.ir.rewriter import Rewriter
from foveate.ir.select import first_of_layer, hidden_into, keep_by_rank, keep_tokens, live_into, visual_order_at
from foveate.passes.base import Pass, number
from foveate.passes.select.selector import check_selection

BUDGETS = {192: (300, 200, 110), 128: (303, 110, 36), 64: (66, 30, 17)}
"""Tokens on average over LLaVA-1.5's 32 layers -> tokens of 576 that stay behind each stage."""

OF = 576


@dataclass(frozen=True)
class SparseVLM(Pass):
    """Behind the i-th of `layers`, floor(keeps[i] * N) of the N visual tokens that reach it stay, and some clusters.

    N are those that reach the first stage. layers: rising. budget: 192, 128 or 64, the counts of the paper's code in
    576; keeps: shares that fall, instead. counts=rank: of the n that are left, floor(scale * (n - rank)) go instead,
    where rank is that of the attention that the raters pay; scale: above 0, up to 1. recycle: whether there are
    clusters.
    """

    name: ClassVar[str] = "sparsevlm"
    source: ClassVar[str] = "SparseVLM, arXiv 2410.04417"

    layers: tuple[int, ...] = (2, 6, 15)
    budget: int = 192
    keeps: tuple[float, ...] | None = None
    recycle: bool = True
    counts: Literal["code", "rank"] = "code"
    scale: float | None = None

    def __post_init__(self) -> None:
        self.require_layers("layers", "[2, 6, 15]", some=True)
        self.as_tuple("keeps")
        self.require(self.budget in BUDGETS, "budget", ", ".join(map(str, BUDGETS)))
        self.require(isinstance(self.recycle, bool), "recycle", "true or false")
        self.require(self.counts in ("code", "rank"), "counts", "code, rank")
        if self.counts == "rank":
            self.require(number(self.scale) and 0 < (self.scale or 0) <= 1, "scale", "above 0, at most 1")
            if self.keeps is not None or self.budget != SparseVLM.budget:
                raise PassError(f"{self.name}: budget and keeps have no meaning here; they belong to counts=code")
            return
        self.require(self.scale is None, "scale", "none but with counts=rank")
        keeps = self.shares()
        falling = isinstance(keeps, tuple) and all(number(x) and 0 < x <= 1 for x in keeps)
        falling = falling and list(keeps) == sorted(keeps, reverse=True) and len(keeps) == len(self.layers)
        self.require(falling, "keeps", f"{len(self.layers)} shares above 0 that do not rise, one a layer")

    def shares(self) -> tuple[float, ...]:
        """The share of all visual tokens that stays behind each stage."""
        # A hair more than the count, so that rounding down gives it.
        return tuple((n + 1e-6) / OF for n in BUDGETS[self.budget]) if self.keeps is None else self.keeps

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        count = edit.program.info.layers
        if self.layers[-1] + 1 >= count:
            raise PassError(f"{self.name}: behind layer {self.layers[-1]} there is none; allowed: 0 to {count - 2}")
        for layer in self.layers:
            check_selection(self.name, edit, layer + 1)
            if not any(looks_at_visual(n) for n in attentions(edit.graph, layer, "text")):
                raise PassError(f"{self.name}: no head of layer {layer} looks at visual tokens, so there is no score")
        inputs = {n.name: n for n in edit.graph.nodes if n.op == "placeholder"}
        reach = visual_order_at(edit.graph, self.layers[0] + 1)
        about = NodeInfo(0, "select", "text", self.name)
        streams = [hidden_into(edit, 0), inputs["text"], visual_order_at(edit.graph, 0), inputs["text_order"]]
        with edit.before(first_of_layer(edit.graph, 0)):
            raters = edit.call(ops.raters, *streams, about=about)
        for stage, layer in enumerate(self.layers):
            yield f"behind layer {layer}: {self._stage(edit, stage, raters, reach)} by the attention of text tokens"

    def _stage(self, edit: Rewriter, stage: int, raters: fx.Node, reach: fx.Node) -> str:
        graph, layer = edit.graph, self.layers[stage] + 1
        asked = next(n for n in attentions(graph, layer - 1, "text") if looks_at_visual(n))
        seen = Attention.of(asked).without_window(self.name, asked)
        live, hidden = live_into(graph, layer), hidden_into(edit, layer)
        rows = seen.q[0], seen.k, seen.q_order[0], seen.k_order, raters, seen.scale
        about = NodeInfo(layer, "select", "visual", self.name)
        with edit.before(first_of_layer(graph, layer)):
            scores = edit.call(ops.rater_scores, *rows, about=about)
        if self.scale is None:
            keep = float(self.shares()[stage])
            keep_tokens(edit, layer, scores, keep, live, reach, hidden if self.recycle else None)
            return f"floor({keep:.4g} x visual tokens) kept"
        with edit.after(scores):
            rank = edit.call(ops.rater_rank, *rows, about=about.with_(stream="none"))
        keep_by_rank(edit, layer, scores, rank, self.scale, live, hidden, self.recycle)
        return f"floor({self.scale:.4g} x (visual tokens - rank)) go"
