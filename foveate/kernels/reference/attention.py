"""Attention, and what is measured of it, from whole matrices."""

import math

import torch
from torch import Tensor

from foveate.ops import PAD


def probabilities(
    q: Tensor,
    k: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    scale: float,
    reach: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """Softmaxed scores float64 [B, H, n, m] of q [B, H, n, e] on k [B, Hk, m, e] under the order rule."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q.double() @ k.double().transpose(2, 3) * scale
    visible = k_order[:, None, None, :] <= (q_order if reach is None else reach)[:, None, :, None]
    if window:
        visible &= k_order[:, None, None, :] > q_order[:, None, :, None] - window
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
    reach: list[Tensor] | None = None,
    window: int = 0,
) -> Tensor:
    """`foveate::attention` from the orders alone; `prefix` and `layout` are not looked at."""
    orders = torch.cat(q_order, 1), torch.cat(k_order, 1)
    last = None if reach is None else torch.cat(reach, 1)
    rows = probabilities(torch.cat(q, 2), torch.cat(k, 2), *orders, scale, last, window)
    values = torch.cat(v, 2).double().repeat_interleave(q[0].shape[1] // v[0].shape[1], dim=1)
    return (rows @ values).transpose(1, 2).to(q[0].dtype).contiguous()


def encoder_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """`foveate::encoder_attention`: softmax over every key."""
    logits = q.double() @ k.double().transpose(2, 3) * scale
    rows = (logits if bias is None else logits + bias.detach()[:, None, None]).softmax(-1)
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
    """`foveate::received_attention` pair by pair, from all weights."""
    first = k[0].shape[2]
    keys, orders = torch.cat(k, 2).repeat_interleave(q.shape[1] // k[0].shape[1], dim=1), torch.cat(k_order, 1)
    found = torch.zeros(q.shape[0], first, dtype=torch.float64)
    for b in range(q.shape[0]):
        last = max((o for o in k_order[0][b].tolist() if o != PAD), default=PAD)
        asked = [i for i, o in enumerate(q_order[b].tolist()) if o != PAD and (o > last or not behind)]
        for i in asked:
            own = int(q_order[b, i])
            seen = [j for j, o in enumerate(orders[b].tolist()) if o <= own]
            if coords is not None:
                near = [j for j in range(first) if k_order[0][b, j] != PAD and (not causal or k_order[0][b, j] <= own)]
                near = [j for j in near if _beside(coords[b, i], coords[b, j], own, k_order[0][b, j], radius, metric)]
                seen = near + [j for j in seen if j >= first]
            weights = (keys[b][:, seen].double() @ q[b, :, i, :, None].double() * scale).softmax(1)[..., 0]
            for place, j in enumerate(seen):
                if j < first:
                    found[b, j] += weights[:, place].max() / len(asked)
    return found.float()


def _beside(here: Tensor, there: Tensor, own: int, other: Tensor, radius: int, metric: str) -> bool:
    """Whether two tokens of an image lie within `radius`: image, row and column, and order, of both."""
    (image, *a), (same, *b) = here.tolist(), there.tolist()
    far = {
        "chebyshev": max(abs(x - y) for x, y in zip(a, b, strict=True)),
        "euclidean": math.dist(a, b),
        "raster": abs(own - int(other)),
    }
    return bool(image == same and far[metric] <= radius)


def received(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """`foveate::received`, from the whole matrix."""
    logits = q.double() @ k.double().transpose(2, 3) * scale
    matrix = (logits if bias is None else logits + bias[:, None, None]).softmax(-1).mean(1)
    return (matrix[:, :-1].mean(1) + matrix[:, -1]).float()


def column_means(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`foveate::column_means`, from the whole matrix."""
    return (q.double() @ k.double().transpose(2, 3) * scale).softmax(-1).mean((1, 2)).float()


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
    """`foveate::attention_statistics` from all weights at once, row by row and pair by pair."""
    batch, heads = q[0].shape[:2]
    mass = torch.zeros(batch, heads, 2, 3, dtype=torch.float64)
    norms = torch.zeros(batch, heads, 2, dtype=torch.float64)
    by_distance = torch.zeros(batch, heads, distances, dtype=torch.float64)
    pairs = torch.zeros(batch, distances, dtype=torch.float64)
    visual, keys = k[0].shape[2], torch.cat(k_order, 1)
    for stream in range(2):
        rows = probabilities(q[stream], torch.cat(k, 2), q_order[stream], keys, scale)
        for b in range(batch):
            real = [i for i, place in enumerate(q_order[stream][b].tolist()) if place != PAD]
            if real:
                norms[b, :, stream] = out[stream][b, real].double().norm(dim=-1).mean(0)
            first = min(k_order[0][b].tolist(), default=PAD)
            for j, place in enumerate(keys[b].tolist()):
                group = 1 if j < visual else 0 if place < first else 2
                if place != PAD:
                    mass[b, :, stream, group] += rows[b, :, real, j].sum(1)
            for i in real if stream == 0 else []:
                for j in range(visual):
                    (image, *here), (other, *there) = coords[b, i].tolist(), coords[b, j].tolist()
                    if image == other and keys[b, j] <= q_order[0][b, i]:
                        far = min(round(math.dist(here, there)), distances - 1)
                        by_distance[b, :, far] += rows[b, :, i, j]
                        pairs[b, far] += 1
    return mass.float(), norms.float(), by_distance.float(), pairs.float()


def activity(x: Tensor, order: Tensor) -> Tensor:
    """`foveate::activity` row by row."""
    means = [row[places != PAD].double().abs().mean(0) for row, places in zip(x, order, strict=True)]
    return torch.stack(means).nan_to_num().float() if means else x.new_zeros(0, x.shape[2]).float()


def divergence(logits: Tensor, other: Tensor) -> Tensor:
    """`foveate::divergence` from the probabilities."""
    p, q = (x[:, 0].double().softmax(-1) for x in (logits, other))
    return (p * (p / q).log()).sum(-1).float()
