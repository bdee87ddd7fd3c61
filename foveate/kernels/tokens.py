"""Choosing visual tokens and gathering what belongs to them."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from foveate.ops import PAD


def top_tokens(scores: Tensor, order: Tensor, keep: float, whole: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`foveate::top_tokens`: a stable descending sort breaks ties towards the lower index, as the reference does."""
    tokens = scores.shape[1]
    slots = math.floor(keep * (tokens if whole is None else whole.shape[1]))
    alive = order != PAD
    counted = alive if whole is None else whole != PAD
    ranked = scores.argsort(dim=1, descending=True, stable=True)
    # Padding goes behind every real token, whatever either scores.
    ranked = ranked.gather(1, (~alive).gather(1, ranked).int().argsort(dim=1, stable=True))[:, :slots]
    ranked = pad(ranked, (0, slots - ranked.shape[1]))
    # float64, so that each row's count is the same floor that Python computes for the whole stream.
    count = (counted.sum(1, keepdim=True, dtype=torch.float64) * keep).floor()
    count = torch.minimum(count, alive.sum(1, keepdim=True))
    spare = torch.arange(slots, device=scores.device) >= count
    # Sorting with the spare slots past every real index restores the old order and moves them to the end.
    index = ranked.masked_fill(spare, tokens).sort(dim=1).values
    spare = index == tokens
    index = index.masked_fill(spare, 0)
    return index, order.gather(1, index).masked_fill(spare, PAD)


def take_tokens(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """`foveate::take_tokens`: rows move as whole blocks, which `gather` with an expanded index does not do."""
    if x.shape[0] == 1 and index.shape[0] == 1:
        return x.index_select(dim, index[0])
    if not len(index):
        return x.new_empty(0, *x.shape[1:dim], index.shape[1], *x.shape[dim + 1 :])
    return torch.stack([x[row if x.shape[0] > 1 else 0].index_select(dim - 1, i) for row, i in enumerate(index)])


def residual(x: Tensor, y: Tensor, rest: Tensor) -> Tensor:
    """`foveate::residual`."""
    out = x + y
    out[:, out.shape[1] - rest.shape[1] :] += rest
    return out
