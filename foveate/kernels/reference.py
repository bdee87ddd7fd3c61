"""The oracle of every kernel: the shortest torch that says what the op means, in float64, S x S tensors allowed."""

import math

import torch
from torch import Tensor

from foveate.ops import PAD


def probabilities(q: Tensor, k: Tensor, q_order: Tensor, k_order: Tensor, scale: float) -> Tensor:
    """Softmaxed scores float64 [B, H, n, m] of q [B, H, n, e] on k [B, Hk, m, e] under the order rule."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.double() @ k.double().transpose(2, 3) * scale
    visible = k_order[:, None, None, :] <= q_order[:, None, :, None]
    return scores.masked_fill(~visible, -math.inf).softmax(-1)


def attention(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_order: list[Tensor],
    k_order: list[Tensor],
    prefix: int,
    layout: str,
    scale: float,
) -> Tensor:
    """`foveate::attention` from the orders alone; `prefix` and `layout` are not looked at."""
    rows = probabilities(torch.cat(q, 2), torch.cat(k, 2), torch.cat(q_order, 1), torch.cat(k_order, 1), scale)
    values = torch.cat(v, 2).double().repeat_interleave(q[0].shape[1] // v[0].shape[1], dim=1)
    return (rows @ values).transpose(1, 2).to(q[0].dtype).contiguous()


def encoder_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """`foveate::encoder_attention`: softmax over every key."""
    rows = (q.double() @ k.double().transpose(2, 3) * scale).softmax(-1)
    return (rows @ v.double()).transpose(1, 2).to(q.dtype)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """`foveate::varlen_attention`: softmax over the keys of the same segment, with a mask over all pairs."""
    places = torch.arange(q.shape[2], device=q.device)
    segment = (places[:, None] >= cu_seqlens[None, 1:]).sum(1)
    scores = q.double() @ k.double().transpose(2, 3) * scale
    rows = scores.masked_fill(segment[:, None] != segment[None, :], -math.inf).softmax(-1)
    return (rows @ v.double()).transpose(1, 2).to(q.dtype).contiguous()


def attention_row(q: Tensor, k: list[Tensor], q_order: Tensor, k_order: list[Tensor], scale: float) -> Tensor:
    """`foveate::attention_row` from the whole softmax."""
    rows = probabilities(q, torch.cat(k, 2), q_order, torch.cat(k_order, 1), scale)
    return rows[..., : k[0].shape[2]].float().contiguous()


def top_tokens(scores: Tensor, order: Tensor, keep: float) -> tuple[Tensor, Tensor]:
    """`foveate::top_tokens` row by row, by Python's own sort."""
    slots = math.floor(keep * scores.shape[1])
    index = torch.zeros(scores.shape[0], slots, dtype=torch.int64)
    kept_order = torch.full_like(index, PAD)
    for row in range(scores.shape[0]):
        alive = [j for j in range(scores.shape[1]) if order[row, j] != PAD]
        ranked = sorted(alive, key=lambda j: (-scores[row, j].item(), j))
        kept = sorted(ranked[: math.floor(keep * len(alive))])
        index[row, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
        kept_order[row, : len(kept)] = order[row, kept]
    return index, kept_order
