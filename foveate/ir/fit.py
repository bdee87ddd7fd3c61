"""How many visual tokens each layer may delete, from statistics and a budget (FitPrune, arXiv 2409.10197, section 3).

    found, budget                                    schedule
    what each token receives in each layer,          for alpha = 0, 0.01, ... 1, by binary search: in each sample and
    from text and from visual tokens                 layer, the tokens that both kinds can spare go; the deletions of
                                                     the smallest alpha that fits the budget, mean over samples

A kind can spare the tokens that receive least, as many as leave a share of 1 - alpha of what the dense model's tokens
receive in that layer. What was deleted in one layer is gone in the next.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from foveate.errors import PassError
from foveate.ir.program import ModelInfo
from foveate.ir.statistics import Statistics

STEPS = 100
"""Of alpha, from 0 to 1."""


def find_schedule(found: Statistics, info: ModelInfo, budget: float) -> tuple[int, ...]:
    """Visual tokens to delete in each layer, of one image's, so that a share `budget` of the visual MACs stays.

    found: statistics that tell visual tokens apart. Raises PassError for a budget that no deletion meets.
    """
    assert found.visual is not None  # the caller asked for it
    whole = found.visual[:, None]

    def remaining(step: int) -> tuple[Tensor, float]:
        left = tokens_left(found, step / STEPS)
        return left, visual_share(info, torch.cat([whole, left], 1))

    low, high = 0, STEPS
    least = remaining(high)[1]
    if least > budget:
        raise PassError(
            f"fitprune: budget={budget}: the first layer alone takes {least:.3g} of the visual MACs; give more"
        )
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if remaining(middle)[1] <= budget else (middle + 1, high)
    left, _ = remaining(high)
    share = torch.cat([whole, left], 1).double() / whole
    deleted = -share.diff(dim=1).mean(0) * info.tokens_per_image
    return tuple(math.floor(count + 0.5) for count in deleted.tolist())


def tokens_left(found: Statistics, alpha: float) -> Tensor:
    """How many visual tokens of each sample each layer leaves to the next: int64 [samples, L]."""
    assert found.visual is not None and found.cross is not None and found.own is not None
    real = torch.arange(int(found.visual.max())) < found.visual[:, None]
    alive, left = real, []
    for layer in range(found.cross.shape[1]):
        spare = real
        for received in (found.cross[:, layer], found.own[:, layer]):
            values = torch.zeros(real.shape, dtype=torch.float64).masked_scatter(real, received.double())
            spare = spare & _spare(values, alive, alpha)
        alive = alive & ~spare
        left.append(alive.sum(1))
    return torch.stack(left, 1)


def visual_share(info: ModelInfo, tokens: Tensor) -> float:
    """Multiply-adds done for visual tokens, as a share of the dense model's; tokens: [samples, 1 + L] that are left.

    Projections and attention take what enters a layer, its output projection and FFN what it leaves.
    """
    wide, narrow = info.heads * info.head_dim, info.kv_heads * info.head_dim
    entering, leaving = tokens[:, :-1].double(), tokens[:, 1:].double()

    def macs(entering: Tensor, leaving: Tensor) -> Tensor:
        seen = entering * info.hidden_size * (wide + 2 * narrow) + 2 * entering.square() * wide
        return (seen + leaving * info.hidden_size * (wide + 3 * info.intermediate_size)).sum()

    dense = tokens[:, :1].double().expand_as(entering)
    return float(macs(entering, leaving) / macs(dense, dense))


def _spare(values: Tensor, alive: Tensor, alpha: float) -> Tensor:
    """The living tokens of each row that receive least, those of [S, n] without which enough is left; last ties go."""
    rising = values.argsort(dim=1, descending=True, stable=True).flip(1)
    ordered, living = values.gather(1, rising), alive.gather(1, rising)
    enough = (1 - alpha) * _from_here(ordered)[:, :1]
    behind = torch.nn.functional.pad(_from_here(ordered * living), (0, 1))[:, 1:]
    return torch.zeros_like(alive).scatter(1, rising, living & (behind >= enough))


def _from_here(values: Tensor) -> Tensor:
    """Sum of each value and those behind it: [S, n]."""
    return values.flip(1).cumsum(1).flip(1)
