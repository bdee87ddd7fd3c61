"""Choosing visual tokens and gathering what belongs to them."""

import math

import torch
from torch import Tensor

from foveate.ops import PAD


def top_tokens(scores: Tensor, order: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """`foveate::top_tokens`: a stable descending sort breaks ties towards the lower index, as the reference does."""
    tokens = scores.shape[1]
    slots = math.floor(keep * tokens)
    alive = order != PAD
    ranked = scores.argsort(dim=1, descending=True, stable=True)
    # Padding goes behind every real token, whatever either scores.
    ranked = ranked.gather(1, (~alive).gather(1, ranked).int().argsort(dim=1, stable=True))[:, :slots]
    # float64, so that each row's count is the same floor that Python computes for the whole stream.
    count = (alive.sum(1, keepdim=True, dtype=torch.float64) * keep).floor()
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
    return torch.stack([x[row if x.shape[0] > 1 else 0].index_select(dim - 1, i) for row, i in enumerate(index)])


def residual(x: Tensor, y: Tensor, rest: Tensor) -> Tensor:
    """`foveate::residual`."""
    out = x + y
    out[:, out.shape[1] - rest.shape[1] :] += rest
    return out


def random_scores(order: Tensor, seed: int) -> Tensor:
    """`foveate::random_scores`: an integer hash of (seed, place), the same on every device and at every length."""
    place = torch.arange(order.shape[1], device=order.device, dtype=torch.int64)
    # Multiplications stay below 2**63: every factor is kept to 31 bits, so no device may differ in overflow.
    mask = 0x7FFFFFFF
    x = (place * 0x2C1B3C6D + (seed & mask)) & mask
    for multiplier in (0x45D9F3B, 0x297A2D39, 0x119DE1F3):
        x = ((x >> 15) ^ x) * multiplier & mask
    # 24 bits are what fp32 holds exactly, so the largest score stays below 1.
    return ((x >> 7).float() / 2**24).expand(order.shape[0], -1).contiguous()
