"""Which tokens stay, and which become one, inside the vision tower; what is tokens x tokens is computed in tiles.

Choices, and the weights by which tokens become one, are constants: gradients flow through `join_tokens` alone.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import normalize

BLOCK = 256
"""Tokens whose likeness to all others is held at once."""

Matched = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of a matching: where each token goes, its weight there, and size and source of the new tokens."""


@torch.no_grad()
def tome(keys: Tensor, size: Tensor | None, source: Tensor, merge: int, sort: bool) -> Matched:
    """`foveate::tome`; the lower index wins a tie."""
    metric = normalize(keys.float().mean(1), dim=-1)
    even, odd = metric[:, ::2], metric[:, 1::2]
    alike, target = _most_alike(even, odd)
    alike[:, 0] = -torch.inf
    ranked = alike.argsort(dim=1, descending=True, stable=True)
    going, staying = ranked[:, :merge], ranked[:, merge:].sort(dim=1).values
    numbers = torch.arange(odd.shape[1], device=keys.device).expand(len(keys), -1)
    stays = torch.cat([2 * staying, 2 * numbers + 1], 1)
    if sort:
        stays = stays.gather(1, source.gather(1, stays).argsort(dim=1, stable=True))
    into = _slots(stays, metric.shape[1])
    into.scatter_(1, 2 * going, into.gather(1, 2 * target.gather(1, going) + 1))
    sizes = torch.ones_like(into, dtype=torch.float32) if size is None else size
    merged = sizes.new_zeros(stays.shape).scatter_add(1, into, sizes)
    return into, sizes / merged.gather(1, into), merged, source.gather(1, stays)


@torch.no_grad()
def received(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """`foveate::received`."""
    total, cross = _column_sums(q, k, scale, bias)
    return (total - cross) / (q.shape[2] - 1) + cross


@torch.no_grad()
def column_means(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """`foveate::column_means`."""
    return _column_sums(q, k, scale)[0] / q.shape[2]


def _column_sums(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums over the rows of the attention matrix, mean over heads, and its last row: fp32 [I, n] each.

    Every query attends to all keys, so a tile of rows has its softmax at once.
    """
    images, _, count, _ = q.shape
    total = torch.zeros(images, count, dtype=torch.float32, device=q.device)
    last = total
    for rows in q.split(BLOCK, 2):
        logits = (rows @ k.transpose(2, 3)).float() * scale
        matrix = (logits if bias is None else logits + bias[:, None, None]).softmax(3).mean(1)
        total, last = total + matrix.sum(1), matrix[:, -1]
    return total, last


@torch.no_grad()
def crossget(keys: Tensor, importance: Tensor, size: Tensor | None, source: Tensor, merge: int) -> Matched:
    """`foveate::crossget`; the lower index wins a tie."""
    metric = normalize(keys.float().mean(1), dim=-1)
    count = metric.shape[1]
    place = torch.arange(count, device=keys.device)
    bound = (place == 0) | (place == count - 1)
    # A token's rank by its largest cosine decides whom it may match; CLS and the cross token match nobody.
    alike, _ = _best_partner(metric, ~bound, bound, None)
    rank = alike.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    behind, _ = _best_partner(metric, ~bound, bound, rank)
    going = (importance - behind).argsort(dim=1, stable=True)[:, :merge]
    stays = torch.ones_like(rank, dtype=torch.bool).scatter(1, going, False)
    _, target = _best_partner(metric, stays & ~bound, bound, None)
    target = target.gather(1, going)
    kept = stays.int().argsort(dim=1, descending=True, stable=True)[:, : count - merge]
    into = _slots(kept, count)
    into.scatter_(1, going, into.gather(1, target))
    sizes = torch.ones_like(importance) if size is None else size
    merged = sizes.new_zeros(kept.shape).scatter_add(1, into, sizes)
    share = (importance.gather(1, going) - importance.gather(1, target)).sigmoid()
    # Each source weighs 2 share, and takes from where it goes what that has more than 1: 2 (1 - share) - 1.
    weight = torch.ones_like(importance).scatter(1, going, 2 * share).scatter_add(1, target, 1 - 2 * share)
    return into, weight * sizes / merged.gather(1, into), merged, source.gather(1, kept)


def join_tokens(x: Tensor, into: Tensor, weight: Tensor, merged: int) -> Tensor:
    """`foveate::join_tokens`: sums in fp32."""
    images, count, width = x.shape
    out = torch.zeros(images, count - merged, width, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    return out.scatter_add(1, into[..., None].expand_as(x), x * weight[..., None].to(out.dtype)).to(x.dtype)


@torch.no_grad()
def cls_curve(x: Tensor, alpha: float, alpha_mode: str) -> tuple[Tensor, Tensor]:
    """`foveate::cls_curve`; of equally like patches the first stay."""
    likeness = cls_likeness(x)
    ranked = likeness.argsort(dim=1, descending=True, stable=True)
    count = kept_by_curve(likeness.gather(1, ranked), alpha, alpha_mode)
    stays = ranked.argsort(dim=1) < count[:, None]
    return (~stays).int().argsort(dim=1, stable=True), count


def cls_likeness(x: Tensor) -> Tensor:
    """How much each patch is like CLS, as shares of 1: x [I, 1 + N, C] -> fp32 [I, N]."""
    wide = x.float()
    logits = (wide[:, 1:] @ wide[:, 0, :, None])[..., 0]
    likeness: Tensor = (logits * x.shape[2] ** -0.5).softmax(1)
    return likeness


def turning_point(curve: Tensor) -> Tensor:
    """Where falling curves [I, N] turn: int64 [I], from 1 to N - 1; N for a flat one."""
    images, count = curve.shape
    if count == 1:
        return torch.ones(images, dtype=torch.int64, device=curve.device)
    left = torch.arange(count - 1, 0, -1, device=curve.device)
    turn = (left * (curve[:, :1] - curve[:, :-1])).argmax(1) + 1
    return torch.where(curve[:, 0] == curve[:, -1], count, turn)


def kept_by_curve(curve: Tensor, alpha: float, alpha_mode: str) -> Tensor:
    """How many tokens stay of falling curves [I, N]: int64 [I]."""
    count, turn = curve.shape[1], turning_point(curve)
    # Whole numbers: 1.1 * 10 is a little more than 11 in floating point, and would be rounded up to 12.
    share = Fraction(alpha).limit_denominator(10**6)
    above, below = share.numerator, share.denominator
    kept = {
        "expand": -(-(below + above) * turn // below),
        "literal": -(-above * turn // below),
        "floor_add": turn - (-above * count // below),
    }[alpha_mode]
    return torch.where(turn == count, count, kept.clamp(1, count))


def padded_keys(x: Tensor, count: Tensor) -> Tensor:
    """`foveate::padded_keys`."""
    behind = torch.arange(x.shape[1], device=x.device) > count[:, None]
    return torch.zeros(x.shape[:2], device=x.device).masked_fill(behind, -torch.inf)


def _most_alike(some: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """For unit vectors some [I, a, e] the largest cosine to others [I, b, e], and whose it is: [I, a] each."""
    best, places = [], []
    for rows in some.split(BLOCK, 1):
        tile = rows @ others.transpose(1, 2)
        places.append(tile.argmax(2))
        best.append(tile.gather(2, places[-1][..., None])[..., 0])
    return torch.cat(best, 1), torch.cat(places, 1)


def _best_partner(unit: Tensor, allowed: Tensor, bound: Tensor, rank: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each token the largest cosine to another that is allowed ([n] or [I, n]), and whose it is: [I, n] each.

    bound [n]: tokens that match nobody. rank [I, n]: only those that stand behind a token are matched with it.
    """
    best, places = [], []
    others = torch.arange(unit.shape[1], device=unit.device)
    for rows in others.split(BLOCK):
        tile = _cosines(unit, int(rows[0]) // BLOCK)
        hidden = (~allowed).expand(len(unit), -1)[:, None] | (others[rows, None] == others) | bound[rows, None]
        if rank is not None:
            hidden = hidden | (rank[:, None] <= rank[:, rows, None])
        tile = tile.masked_fill(hidden, -torch.inf)
        places.append(tile.argmax(2))
        best.append(tile.gather(2, places[-1][..., None])[..., 0])
    return torch.cat(best, 1), torch.cat(places, 1)


def _cosines(unit: Tensor, number: int) -> Tensor:
    """The tile of that number: cosines of its tokens to all, [I, BLOCK, n].

    Two tokens' cosine is the same number whichever of them asks: where they are most alike to each other they must tie
    exactly, so that the first of them wins on every machine.
    """
    blocks = unit.split(BLOCK, 1)
    own = blocks[number]
    parts = [(x @ own.transpose(1, 2)).transpose(1, 2) for x in blocks[:number]]
    square = own @ own.transpose(1, 2)
    parts.append(square.triu() + square.triu(1).transpose(1, 2))
    parts += [own @ x.transpose(1, 2) for x in blocks[number + 1 :]]
    return torch.cat(parts, 2)


def _slots(stays: Tensor, count: int) -> Tensor:
    """The new place [I, n] of each token that stays [I, k]; 0 for the others."""
    places = torch.arange(stays.shape[1], device=stays.device).expand_as(stays)
    return stays.new_zeros(len(stays), count).scatter(1, stays, places)
