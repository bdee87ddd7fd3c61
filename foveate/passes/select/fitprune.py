"""Delete visual tokens in many layers, as many in each as calibration says it can spare.

    before, in each layer that deletes       after
    a.visual = attention(q.visual; both)     the same; the layer's keys and values stay whole
    h.visual = h.visual + o(a.visual)        s = what a token receives from text times what it receives from the image
                                             o, FFN and all later layers read the best s, old order

FitPrune (arXiv 2409.10197, section 3): of each query's weights the largest over heads counts; the means over text
behind the image and over visual tokens are multiplied. Positions are kept. What the last layer deletes costs nothing
anyway: no program computes what nobody reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from foveate import ops
from foveate.errors import PassError
from foveate.ir.attention import Attention, attentions, looks_at_visual, taken_apart
from foveate.ir.fit import find_schedule, visual_share
from foveate.ir.program import NodeInfo
from foveate.ir.rewriter import Rewriter
from foveate.ir.select import keep_tokens, part_behind, visual_order_at
from foveate.passes.base import Pass, Skipped, first_blind_layer, number, whole
from foveate.passes.select.selector import check_selection

aten = torch.ops.aten


EARLY = (14, 33, 89, 36, 36, 20, 55, 21, 18, 4, 7, 5, 2, 5, 7, 4, 26, 5, 11, 24, 4, 18, 2, 1)
PUBLISHED = {"llava-1.5-7b": (*EARLY, 0, 0, 1, 0, 1, 0, 0, 0)}
"""Schedules of the paper's code, by model: that of 7B is for a reduction by 60%, of 576 tokens."""


@dataclass(frozen=True)
class FitPrune(Pass):
    """Layer l deletes schedule[l] of an image's N visual tokens; of other numbers of tokens, the same share.

    budget: the share of multiply-adds for visual tokens that stays, above 0, below 1; the schedule is then found from
    statistics (stats: a file made by `foveate calibrate --tokens`). schedule: one number a layer instead, or
    `llava-1.5-7b`, the published one.
    """

    name: ClassVar[str] = "fitprune"
    source: ClassVar[str] = "FitPrune, arXiv 2409.10197"

    budget: float = 0.4
    schedule: tuple[int, ...] | str | None = None
    stats: str | None = None

    def __post_init__(self) -> None:
        self.require(number(self.budget) and 0 < self.budget < 1, "budget", "a share of the work, above 0, below 1")
        counts = self.as_tuple("schedule")
        counts = PUBLISHED.get(counts, counts) if isinstance(counts, str) else counts
        counted = counts is None or (isinstance(counts, tuple) and all(whole(n) and n >= 0 for n in counts))
        self.require(counted, "schedule", f"numbers of tokens, one a layer, or {', '.join(PUBLISHED)}")
        self.require(self.stats is None or isinstance(self.stats, str), "stats", "a file made by `foveate calibrate`")
        if counts is not None and (self.stats is not None or self.budget != FitPrune.budget):
            raise PassError(f"{self.name}: give a schedule, or budget and stats, by which one is found")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        about, counts = edit.program.info, self._counts(edit)
        # What is deleted in the last layer that sees the image is read by nobody.
        end = first_blind_layer(edit.graph) - 1
        stages = [layer for layer, count in enumerate(counts[: max(0, end)]) if count]
        if not stages:
            raise Skipped(f"no token is to be deleted before the last layer that sees the image, {end}")
        reach = visual_order_at(edit.graph, stages[0] + 1)
        left = [about.tokens_per_image]
        for layer, count in enumerate(counts):
            left.append(left[-1] - (count if layer in stages else 0))
            if layer in stages:
                self._stage(edit, layer, left[-1] / left[0], reach)
        share = visual_share(about, torch.tensor([left]))
        deleted = ", ".join(map(str, counts[: stages[-1] + 1]))
        yield f"layers from 0 on delete {deleted} of {left[0]} visual tokens; {share:.1%} of their multiply-adds stay"

    def _counts(self, edit: Rewriter) -> tuple[int, ...]:
        about, counts = edit.program.info, self.schedule
        if isinstance(counts, str):
            counts = PUBLISHED[counts]
        if counts is None:
            found = self.statistics(edit, self.stats, f"budget={self.budget}")
            if found.visual is None:
                raise PassError(f"{self.name}: the statistics do not tell tokens apart: `foveate calibrate --tokens`")
            counts = find_schedule(found, about, float(self.budget))
        if len(counts) != about.layers or sum(counts) >= about.tokens_per_image:
            raise PassError(
                f"{self.name}: a schedule of {len(counts)} layers that deletes {sum(counts)} tokens does not fit this "
                f"model: it has {about.layers} layers, and an image {about.tokens_per_image} tokens, of which one stays"
            )
        return counts

    def _stage(self, edit: Rewriter, layer: int, keep: float, reach: fx.Node) -> None:
        graph = edit.graph
        check_selection(self.name, edit, layer + 1)
        looking = [[n for n in attentions(graph, layer, s) if looks_at_visual(n)] for s in ("text", "visual")]
        if not all(looking):
            raise PassError(f"{self.name}: no head of layer {layer} looks at visual tokens, so there is no score")
        for node in (nodes[0] for nodes in looking):
            if isinstance(seen := taken_apart(node), Attention):
                seen.checked(self.name, node)
        start, live = part_behind(edit, layer, attentions(graph, layer))
        about = NodeInfo(layer, "select", "visual", self.name)
        with edit.before(start):
            received = [
                edit.call(ops.received_attention, *taken_apart(nodes[0]).received, about=about) for nodes in looking
            ]
            scores = edit.call(aten.mul.Tensor, *received, about=about)
        # A hair more than the share, so that rounding down gives the count.
        keep_tokens(edit, layer + 1, scores, keep + 1e-9, live, reach)
