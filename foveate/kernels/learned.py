"""What trained selections compute: cross-attention, decisions, and attention that heeds them.

Weighted attention works in blocks of queries, forward and backward, so memory grows linearly with the tokens. With
A the logits, M the weights (see `foveate.ops.weighted_attention`) and m the largest A of a row that has a weight:

    p = e^(A - m) M / Z        out = p v        dp = dout v^T        s = dp - sum(p dp)
    dA = p s                   dM = e^(A - m) / Z s

A key without a weight has a gradient, so no logarithm of a weight is ever taken.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.ops import BLOCK, PAD

STEEPEST = 60.0
"""The logit of a key without a weight counts as at most so much above those that have one, lest e^x overflow."""


def cross_attention(q: Tensor, k: Tensor, v: Tensor, until: Tensor, k_order: Tensor, scale: float) -> Tensor:
    """`foveate::cross_attention`: the mask is the same for every query."""
    seen = (k_order <= until) & (k_order != PAD)
    # One row of the mask serves all queries; a row of it for each would be n x m.
    mask = seen[:, None, None, :].expand(-1, 1, q.shape[2], -1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).contiguous()


def mean_token(x: Tensor, order: Tensor, weights: Tensor | None = None) -> Tensor:
    """`foveate::mean_token`."""
    counted = (order != PAD).float()
    counted = counted if weights is None else counted * weights
    # A sum of zeros is divided by 1; fewer than one token cannot be counted.
    shares = counted / counted.sum(1, keepdim=True).clamp(min=1)
    return (shares.to(x.dtype)[:, None] @ x).contiguous()


def decide(scores: Tensor, noise: Tensor, before: Tensor | None = None) -> Tensor:
    """`foveate::decide`: the value is the hard choice exactly, the gradient that of the soft one."""
    drawn = scores.float() + noise.float()
    soft = drawn.sigmoid()
    choice = (drawn > 0).float() + (soft - soft.detach())
    return choice if before is None else choice * before.float()


@dataclass(frozen=True)
class _Keys:
    """Keys and values [B, H, m, e] of all streams, each repeated for the query heads that share it; fp32 at least."""

    k: Tensor
    v: Tensor
    order: Tensor
    weights: Tensor
    scale: float

    @classmethod
    def of(
        cls, heads: int, k: list[Tensor], v: list[Tensor], order: list[Tensor], weights: Tensor, scale: float
    ) -> _Keys:
        wide = torch.promote_types(k[0].dtype, torch.float32)
        key, value = (torch.cat(x, 2).to(wide).repeat_interleave(heads // x[0].shape[1], dim=1) for x in (k, v))
        return cls(key, value, torch.cat(order, 1), weights.to(wide), scale)

    def rows(self, q: Tensor, q_order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a block of queries: e^(A - m) / Z and M, both [B, H, n, m], and which visual keys M weighs."""
        logits = (q.to(self.k.dtype) @ self.k.transpose(2, 3)) * self.scale
        visible = self.order[:, None, :] <= q_order[:, :, None]
        visual = self.weights.shape[1]
        weighed = visible[:, :, :visual] & (self.order[:, None, :visual] != q_order[:, :, None])
        mask = visible.to(self.k.dtype)
        mask[:, :, :visual] = torch.where(weighed, self.weights[:, None, :], mask[:, :, :visual])
        mask = mask[:, None]
        top = logits.masked_fill(mask == 0, -torch.inf).amax(3, keepdim=True)
        raised = (logits - top).clamp(max=STEEPEST).exp() * visible[:, None]
        return raised / (raised * mask).sum(3, keepdim=True), mask, weighed[:, None]


def weighted_attention(
    q: Tensor,
    k: list[Tensor],
    v: list[Tensor],
    q_order: Tensor,
    k_order: list[Tensor],
    weights: Tensor,
    scale: float,
) -> Tensor:
    """`foveate::weighted_attention`; shapes as in `foveate.ops`."""
    keys = _Keys.of(q.shape[1], k, v, k_order, weights, scale)
    outs = []
    for block, order in zip(q.split(BLOCK, 2), q_order.split(BLOCK, 1), strict=True):
        shares, mask, _ = keys.rows(block, order)
        outs.append((shares * mask) @ keys.v)
    return torch.cat(outs, 2).transpose(1, 2).to(q.dtype).contiguous()


def weighted_gradients(
    grad: Tensor,
    q: Tensor,
    k: list[Tensor],
    v: list[Tensor],
    q_order: Tensor,
    k_order: list[Tensor],
    weights: Tensor,
    scale: float,
) -> list[Tensor]:
    """Gradients of q, each k, each v and the weights, from that of the result [B, n, H, e]."""
    keys = _Keys.of(q.shape[1], k, v, k_order, weights, scale)
    visual = weights.shape[1]
    dq, dk, dv, dm = [], torch.zeros_like(keys.k), torch.zeros_like(keys.v), torch.zeros_like(keys.weights)
    blocks = zip(q.split(BLOCK, 2), q_order.split(BLOCK, 1), grad.split(BLOCK, 1), strict=True)
    for block, order, part in blocks:
        out = part.transpose(1, 2).to(keys.k.dtype)
        shares, mask, weighed = keys.rows(block, order)
        paid = shares * mask
        slope = out @ keys.v.transpose(2, 3)
        slope = slope - (paid * slope).sum(3, keepdim=True)
        dv += paid.transpose(2, 3) @ out
        dm += (shares[..., :visual] * slope[..., :visual] * weighed).sum((1, 2))
        inner = paid * slope * scale
        dq.append(inner @ keys.k)
        dk += inner.transpose(2, 3) @ block.to(keys.k.dtype)
    sizes = [x.shape[2] for x in k]
    shared = [_grouped(x, y[0].shape[1]).split(sizes, 2) for x, y in ((dk, k), (dv, v))]
    streams = [x.to(y.dtype).contiguous() for parts, ys in zip(shared, (k, v), strict=True) for x, y in zip(parts, ys)]
    return [torch.cat(dq, 2).to(q.dtype), *streams, dm.to(weights.dtype)]


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """Gradients [B, H, m, e] of repeated keys as those of the keys [B, Hk, m, e]."""
    grouped: Tensor = x.unflatten(1, (kv_heads, x.shape[1] // kv_heads))
    return grouped.sum(2)
