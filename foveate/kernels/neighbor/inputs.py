"""What every form is given, and what forms share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.neighborhood import Call


@dataclass(frozen=True)
class Inputs:
    """The tensors of one call, shapes as in `foveate.ops.neighbor_attention`; a text stream may have no token."""

    q: Tensor
    k: tuple[Tensor, Tensor]
    v: tuple[Tensor, Tensor]
    q_order: Tensor
    k_order: tuple[Tensor, Tensor]
    coords: Tensor
    scale: float


def near(down: Tensor, right: Tensor, call: Call) -> Tensor:
    """Does a query see a key of its image that it is so many rows below and so many columns right of?"""
    if call.metric == "euclidean":
        seen = down * down + right * right <= call.radius**2
    else:
        seen = (down.abs() <= call.radius) & (right.abs() <= call.radius)
    return seen & ((down > 0) | (down == 0) & (right >= 0)) if call.causal else seen


def added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to scores: finite, so that a query that sees nothing has no NaN."""
    low = torch.tensor(torch.finfo(dtype).min / 2, dtype=dtype, device=seen.device)
    return torch.where(seen, torch.zeros_like(low), low)
