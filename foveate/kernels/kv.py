"""What leaves a cache of keys and values. Rows are computed for few queries at once, never for all."""

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from foveate.kernels.attention import grouped, in_sequence, softmaxed_rows
from foveate.kernels.neighbor.reference import visible
from foveate.ops import PAD
from foveate.ops.kv import ROWS, heavy_recent_count, snapkv_count


def attention_sums(q: Tensor, k: list[Tensor], q_order: Tensor, k_order: list[Tensor], scale: float) -> Tensor:
    """`foveate::attention_sums`."""
    found = _zeros(q, k)
    for block, order in zip(q.split(ROWS, 2), q_order.split(ROWS, 1), strict=True):
        _add(found, softmaxed_rows(block, k, order, k_order, scale), order)
    return found


def attention_with_sums(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_order: list[Tensor],
    k_order: list[Tensor],
    prefix: int,
    layout: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`foveate::attention_with_sums`; in sequence order, where that is known, a block sees no key behind its last."""
    ordered = prefix >= 0
    queries, keys, values = (in_sequence(x, prefix) if ordered else torch.cat(x, 2) for x in (q, k, v))
    orders = ([x[:, None] for x in xs] for xs in (q_order, k_order))
    q_places, k_places = ((in_sequence(x, prefix) if ordered else torch.cat(x, 2))[:, 0] for x in orders)
    outs, sums = [], _zeros(q[0], k)
    for start in range(0, queries.shape[2], ROWS):
        block = slice(start, start + ROWS)
        seen = slice(0, min(start + ROWS, keys.shape[2]) if ordered else keys.shape[2])
        order = q_places[:, block]
        rows = softmaxed_rows(queries[:, :, block], [keys[:, :, seen]], order, [k_places[:, seen]], scale)
        outs.append(grouped(rows.to(values.dtype), values[:, :, seen]))
        _add(sums[:, :, seen], rows.detach(), order)
    out = torch.cat(outs, 2).transpose(1, 2) if outs else queries.transpose(1, 2)
    if not ordered:
        return out.contiguous(), sums
    visual = q[0].shape[2]
    return _in_streams(out, 1, prefix, visual), _in_streams(sums, 2, prefix, visual)


def neighbor_sums(
    q: Tensor,
    k: list[Tensor],
    q_order: Tensor,
    k_order: list[Tensor],
    q_coords: Tensor,
    coords: Tensor,
    radius: int,
    metric: str,
    causal: bool,
    see_text: bool,
    scale: float,
) -> Tensor:
    """`foveate::neighbor_sums`; every score of a block is computed, and those out of sight are hidden."""
    found = _zeros(q, k)
    batch, heads, _, size = q.shape
    for start in range(0, q.shape[2], ROWS):
        block = slice(start, start + ROWS)
        order, where, rows = q_order[:, block], q_coords[:, block], q[:, :, block]
        seen = [visible(order, where, k_order[0], coords, radius, metric, causal)]
        seen += [(keys[:, None] <= order[..., None]) & see_text for keys in k_order[1:]]
        groups = rows.reshape(batch, k[0].shape[1], -1, size)
        scores = torch.cat([(groups @ x.transpose(2, 3)).float() for x in k], 3).mul(scale)
        scores = scores.view(batch, heads, rows.shape[2], -1).masked_fill(~torch.cat(seen, 2)[:, None], -math.inf)
        _add(found, scores.softmax(-1), order)
    return found


def window_tokens(order: Tensor, others: list[Tensor], window: int) -> tuple[Tensor, Tensor]:
    """`foveate::window_tokens`."""
    count = order.shape[1]
    slots = min(window, count)
    rows = torch.cat([order, *others], 1)
    # Padding gets places before all real tokens, so that the largest are the last real ones.
    last = rows.masked_fill(rows == PAD, -1).topk(min(window, rows.shape[1]), 1).values
    chosen = (order != PAD) & (order >= last[:, -1:].clamp(min=0))
    # A stable sort puts the chosen in front, in their old order.
    index = (~chosen).int().argsort(dim=1, stable=True)[:, :slots]
    spare = ~chosen.gather(1, index)
    index = index.masked_fill(spare, 0)
    return index, order.gather(1, index).masked_fill(spare, PAD)


def snapkv_tokens(
    scores: Tensor, orders: list[Tensor], capacity: float, window: int, kernel: int, pooling: str
) -> tuple[Tensor, Tensor]:
    """`foveate::snapkv_tokens`."""
    order = torch.cat(orders, 1)
    in_row = order.argsort(dim=1, stable=True)
    count = (order != PAD).sum(1, keepdim=True)
    column = torch.arange(order.shape[1], device=order.device)
    earlier = (column < count - window)[:, None]
    ranked = _gathered(scores, in_row)
    if pooling == "avg":
        pooled = avg_pool1d(ranked.masked_fill(~earlier, 0.0), kernel, 1, kernel // 2)
    else:
        pooled = max_pool1d(ranked.masked_fill(~earlier, -math.inf), kernel, 1, kernel // 2)
    pooled = pooled.masked_fill(~earlier, math.inf).masked_fill((column >= count)[:, None], -math.inf)
    if capacity < 1:
        # float64, so that each row's count is the same floor that Python computes.
        keep = torch.minimum(count, (count.double() * capacity).floor().long().clamp(min=window))
    else:
        keep = count.clamp(max=int(capacity))
    return _best(pooled, order, in_row, keep, snapkv_count(order.shape[1], capacity, window))


def heavy_tokens(
    sums: Tensor, orders: list[Tensor], heavy: float, recent: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`foveate::heavy_tokens`."""
    order = torch.cat(orders, 1)
    in_row = order.argsort(dim=1, stable=True)
    count = (order != PAD).sum(1, keepdim=True)
    column = torch.arange(order.shape[1], device=order.device)
    # float64, so that each row's counts are those that Python computes.
    shares = [count.double() * x if x < 1 else torch.full_like(count, int(x)).double() for x in (heavy, recent)]
    budget = torch.cat([shares[0].floor(), shares[1].ceil()], 1).long()
    ranked = _gathered(sums, in_row)
    late = (column >= count - budget[:, 1:])[:, None]
    values = ranked.masked_fill(late, math.inf).masked_fill((column >= count)[:, None], -math.inf)
    keep = torch.minimum(count, budget.sum(1, keepdim=True))
    slots = min(order.shape[1], heavy_recent_count(order.shape[1], heavy, recent))
    index, places = _best(values, order, in_row, keep, slots)
    return index, places, sums.gather(2, index).masked_fill(places == PAD, 0.0), budget


def take_keys(x: list[Tensor], index: Tensor) -> Tensor:
    """`foveate::take_keys`."""
    whole = torch.cat(x, 2) if len(x) > 1 else x[0]
    return whole.gather(2, index[..., None].expand(-1, -1, -1, whole.shape[3]))


def _zeros(q: Tensor, k: list[Tensor]) -> Tensor:
    return q.new_zeros(q.shape[0], k[0].shape[1], sum(x.shape[2] for x in k), dtype=torch.float32)


def _add(sums: Tensor, rows: Tensor, order: Tensor) -> None:
    """Add rows [B, H, r, m] of queries that are no padding to sums [B, Hk, m], over each group of heads."""
    rows = rows.masked_fill((order == PAD)[:, None, :, None], 0.0)
    sums += rows.sum(2).unflatten(1, (sums.shape[1], -1)).sum(2)


def _in_streams(x: Tensor, dim: int, prefix: int, visual: int) -> Tensor:
    """What stands in sequence order, visual tokens first again."""
    before, image, behind = x.tensor_split([prefix, prefix + visual], dim)
    return torch.cat([image, before, behind], dim)


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """x [B, Hk, n] in another order of its tokens, index [B, n]."""
    return x.gather(2, index[:, None].expand_as(x))


def _best(values: Tensor, order: Tensor, in_row: Tensor, keep: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """The `keep` [B, 1] largest values [B, Hk, n] of tokens in the order of the row, as index and places."""
    count = values.shape[2]
    best = values.argsort(dim=2, descending=True, stable=True)[..., :slots]
    spare = torch.arange(slots, device=values.device) >= keep
    # Sorting with the spare slots past every token restores the order of the row and moves them to the end.
    best = best.masked_fill(spare[:, None], count).sort(dim=2).values
    spare = best == count
    heads = values.shape[1]
    index = in_row[:, None].expand(-1, heads, -1).gather(2, best.masked_fill(spare, 0)).masked_fill(spare, 0)
    places = order[:, None].expand(-1, heads, -1).gather(2, index).masked_fill(spare, PAD)
    return index, places
