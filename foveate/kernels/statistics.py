"""What calibration counts, in blocks of queries: no tensor holds a weight for each pair of tokens."""

import torch
from torch import Tensor

from foveate.kernels.attention import softmaxed_rows
from foveate.ops import PAD

BLOCK = 64
"""Queries at once. Every head's weights of a block are held, where attention itself holds a mask for all heads."""


def attention_statistics(
    q: list[Tensor],
    k: list[Tensor],
    out: list[Tensor],
    q_order: list[Tensor],
    k_order: list[Tensor],
    coords: Tensor,
    distances: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`foveate::attention_statistics`; shapes as in `foveate.ops`."""
    batch, heads = q[0].shape[:2]
    mass = q[0].new_zeros(batch, heads, 2, 3, dtype=torch.float64)
    # One more "head", whose weights are 1, counts the pairs.
    by_distance = q[0].new_zeros(batch, heads + 1, distances, dtype=torch.float64)
    groups = _groups(k_order)
    visual = k[0].shape[2]
    for stream, (queries, orders) in enumerate(zip(q, q_order, strict=True)):
        for start in range(0, queries.shape[2], BLOCK):
            block = slice(start, start + BLOCK)
            order = orders[:, block]
            rows = softmaxed_rows(queries[:, :, block], k, order, k_order, scale)
            rows = rows.masked_fill((order == PAD)[:, None, :, None], 0.0)
            mass[:, :, stream] += rows.sum(2).double() @ groups
            if stream == 0 and visual:
                _add_by_distance(by_distance, rows[..., :visual], order, k_order[0], coords, block)
    norms = torch.stack([_mean_norm(x, order) for x, order in zip(out, q_order, strict=True)], 2)
    found = by_distance.float()
    return mass.float(), norms, found[:, :heads].contiguous(), found[:, heads].contiguous()


def activity(x: Tensor, order: Tensor) -> Tensor:
    """`foveate::activity`; shapes as in `foveate.ops`."""
    return _mean(x.float().abs(), order)


def divergence(logits: Tensor, other: Tensor) -> Tensor:
    """`foveate::divergence`; shapes as in `foveate.ops`."""
    p, q = (x[:, 0].float().log_softmax(-1) for x in (logits, other))
    return (p.exp() * (p - q)).sum(-1)


def _groups(k_order: list[Tensor]) -> Tensor:
    """Which of prefix text, visual and later text a key belongs to: float64 [B, m, 3], all zero for padding."""
    visual, text = k_order
    batch = visual.shape[0]
    first = torch.cat([visual, visual.new_full((batch, 1), PAD)], 1).amin(1, keepdim=True)
    none_v, none_t = torch.zeros_like(visual, dtype=torch.bool), torch.zeros_like(text, dtype=torch.bool)
    members = (
        torch.cat([none_v, text < first], 1),
        torch.cat([visual != PAD, none_t], 1),
        torch.cat([none_v, (text > first) & (text != PAD)], 1),
    )
    return torch.stack(members, 2).double()


def _add_by_distance(
    sums: Tensor, rows: Tensor, order: Tensor, key_order: Tensor, coords: Tensor, block: slice
) -> None:
    """Add a block's weights [B, H, r, m] to float64 sums [B, H + 1, distances]."""
    mine, keys = coords[:, block, None], coords[:, None]
    apart = (mine[..., 1:] - keys[..., 1:]).float()
    far = apart.square().sum(-1).sqrt().round().long().clamp(max=sums.shape[2] - 1)
    seen = (mine[..., 0] == keys[..., 0]) & (key_order[:, None] <= order[..., None]) & (order != PAD)[..., None]
    weights = torch.cat([rows, torch.ones_like(rows[:, :1])], 1).masked_fill(~seen[:, None], 0.0).flatten(2)
    index = far.flatten(1)[:, None].expand(-1, weights.shape[1], -1)
    sums.scatter_add_(2, index, weights.double())


def _mean_norm(out: Tensor, order: Tensor) -> Tensor:
    """Mean norm of each head's output [B, n, H, e] over real tokens: fp32 [B, H]."""
    return _mean(out.float().norm(dim=-1), order)


def _mean(x: Tensor, order: Tensor) -> Tensor:
    """Mean over real tokens: fp32 [B, n, m] -> [B, m]."""
    real = order != PAD
    total = x.masked_fill(~real[..., None], 0.0).sum(1)
    return total / real.sum(1, keepdim=True).clamp(min=1)
