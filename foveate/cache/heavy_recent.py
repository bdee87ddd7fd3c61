"""One layer's cache of the tokens that most was paid to and of the last ones: slots that are written over in place.

    slots [B, Hk, P]     3   17   4   0   18   16        numbers of a row's tokens, here of heavy=3, recent=3
    token 19 comes       16 is not recent any more; of 0, 3, 4 and 16 the one with the least sum leaves
                         3   17   19  0   18   16        and token 19 takes its slot (here 4 had the least)

Slots have no order: keys are rotated already, and of the last tokens' numbers it is known which they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate.cache.growing import Growing
from foveate.ops import PAD


class HeavyRecentCache:
    """The keys and values of one layer, each row and key head apart (H2O, arXiv 2306.14048, section 4).

    k, v: what a prefill left [B, Hk, C, e]; places int64 [B, Hk, C], rising, `PAD` behind a row's last; sums fp32
    [B, Hk, C]: what was paid to them; budget int64 [B, 2]: how many heavy and recent tokens a row holds.
    """

    def __init__(self, k: Tensor, v: Tensor, places: Tensor, sums: Tensor, budget: Tensor) -> None:
        self.budget = budget
        # Of each row [B, 1, 1]: the number of the next token. Those that left before are not counted.
        self.next = (places[:, :1] != PAD).sum(2, keepdim=True)
        self.most, held = int(budget.sum(1).max()), int(self.next.max())
        numbers = torch.arange(places.shape[2], device=places.device).expand_as(places)
        numbers = numbers.masked_fill(places == PAD, PAD)
        # No row of the batch may fill what is behind `held`.
        self.k, self.v, self.numbers, self.sums = (
            Growing(x[:, :, :held], 2, empty, self.most) for x, empty in ((k, 0), (v, 0), (numbers, PAD), (sums, 0))
        )

    @property
    def parts(self) -> tuple[Growing, ...]:
        """What has a slot for each token."""
        return self.k, self.v, self.numbers, self.sums

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and their order [B, P], as the decode graph takes them."""
        # A row has as many tokens in every head, and in the same slots.
        return self.k.view(), self.v.view(), self.numbers.view()[:, 0].contiguous()

    def step(self, k: Tensor, v: Tensor, scores: Tensor) -> None:
        """Take over a token's key and value [B, Hk, 1, e], and what it paid to each slot and itself [B, Hk, P + 1]."""
        self.sums.view().add_(scores[..., :-1])
        if self.k.length < self.most:
            for part in self.parts:
                part.lengthen(1)
        slot = self._leaving()[..., None]
        wide = slot[..., None].expand(-1, -1, -1, k.shape[3])
        for part, new in ((self.k, k), (self.v, v)):
            part.view().scatter_(2, wide, new.to(part.buffer.dtype))
        self.numbers.view().scatter_(2, slot, self.next.expand_as(slot))
        self.sums.view().scatter_(2, slot, scores[..., -1:])
        self.next = self.next + 1

    def _leaving(self) -> Tensor:
        """The slot [B, Hk] for the next token: a free one where a row may hold more, or the one with the least sum."""
        numbers = self.numbers.view()
        free = numbers == PAD
        heavy, recent = self.budget[:, None].split(1, 2)
        more = (~free).sum(2, keepdim=True) < heavy + recent
        stays = free | (numbers > self.next - recent)
        worth = torch.where(more, torch.where(free, -math.inf, math.inf), self.sums.view().masked_fill(stays, math.inf))
        least = worth == worth.amin(2, keepdim=True)
        # Of equal sums the later token leaves.
        return torch.where(least, numbers, -1).argmax(2)

    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        return self.k.view().nbytes + self.v.view().nbytes

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order (beam search)."""
        for part in self.parts:
            part.select_rows(rows)
        self.budget, self.next = self.budget.index_select(0, rows), self.next.index_select(0, rows)
