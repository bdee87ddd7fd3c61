"""The oracle of neighbour attention, and who sees whom: from orders and coordinates alone, no grid is looked at."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.ops import PAD


def visible(
    q_order: Tensor, q_coords: Tensor, k_order: Tensor, k_coords: Tensor, radius: int, metric: str, causal: bool
) -> Tensor:
    """Which of the visual keys each visual query sees: orders [B, q], [B, k], coords [B, q, 3], [B, k, 3].

    Returns bool [B, q, k].
    """
    own, key = q_order[:, :, None], k_order[:, None, :]
    image, row, column = (q_coords[:, :, None] - k_coords[:, None, :]).unbind(-1)
    if metric == "chebyshev":
        near = (row.abs() <= radius) & (column.abs() <= radius)
    elif metric == "euclidean":
        near = row * row + column * column <= radius * radius
    else:
        near = (own - key).abs() <= radius
    seen = near & (image == 0) & (key != PAD)
    return seen & (key <= own) if causal else seen


def neighbor_attention(
    q: Tensor,
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    q_order: Tensor,
    k_order: Sequence[Tensor],
    coords: Tensor,
    grids: Tensor,
    radius: int,
    metric: str,
    causal: bool,
    scale: float,
) -> Tensor:
    """`foveate::neighbor_attention` in float64, every score computed; `grids` is not looked at."""
    group = q.shape[1] // k[0].shape[1]
    keys, values = (torch.cat(list(x), 2).double().repeat_interleave(group, dim=1) for x in (k, v))
    parts = [visible(q_order, coords, k_order[0], coords, radius, metric, causal)]
    parts += [order[:, None, :] <= q_order[:, :, None] for order in k_order[1:]]
    seen = torch.cat(parts, 2)[:, None]
    # A padded query may see nothing at all: a large negative score, not an infinite one, keeps its row finite.
    scores = (q.double() @ keys.transpose(2, 3) * scale).masked_fill(~seen, -1e300)
    return (scores.softmax(-1) @ values).transpose(1, 2).to(q.dtype).contiguous()
