"""What visual tokens receive, in blocks of queries: no tensor holds a weight for each pair of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.kernels.attention import softmaxed_rows
from foveate.kernels.guided import behind_images
from foveate.kernels.neighbor.reference import visible
from foveate.ops import PAD

BLOCK = 64
"""Queries at once. Every head's weights of a block are held, and one for all heads is left of them."""


def received_attention(
    q: Tensor,
    k: list[Tensor],
    q_order: Tensor,
    k_order: list[Tensor],
    behind: bool,
    scale: float,
    coords: Tensor | None = None,
    radius: int = 0,
    metric: str = "chebyshev",
    causal: bool = False,
) -> Tensor:
    """`foveate::received_attention`; shapes as in `foveate.ops`."""
    counted = behind_images(k_order[0], q_order) if behind else q_order != PAD
    share = counted / counted.sum(1, keepdim=True).clamp(min=1)
    found = q.new_zeros(q.shape[0], k[0].shape[2], dtype=torch.float32)
    for start in range(0, q.shape[2], BLOCK):
        block = slice(start, start + BLOCK)
        order = q_order[:, block]
        seen = None
        if coords is not None:
            near = visible(order, coords[:, block], k_order[0], coords, radius, metric, causal)
            seen = torch.cat([near, *(keys[:, None, :] <= order[:, :, None] for keys in k_order[1:])], 2)
        rows = softmaxed_rows(q[:, :, block], k, order, k_order, scale, seen)[..., : k[0].shape[2]].amax(1)
        found += (rows.masked_fill(~counted[:, block, None], 0.0) * share[:, block, None]).sum(1)
    return found
