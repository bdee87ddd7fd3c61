"""Scores by which visual tokens are chosen, other than attention's."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.ops import ROUND

BITS = 12
"""Of a row or column number; two of them fit the 24 bits that fp32 holds exactly."""

BLOCK = 256
"""Tokens whose distances to all others are held at once."""


def random_scores(order: Tensor, seed: int) -> Tensor:
    """`foveate::random_scores`: an integer hash of (seed, place), the same on every device and at every length."""
    place = torch.arange(order.shape[1], device=order.device, dtype=torch.int64)
    # Multiplications stay below 2**63: every factor is kept to 31 bits, so no device may differ in overflow.
    mask = 0x7FFFFFFF
    x = (place * 0x2C1B3C6D + (seed & mask)) & mask
    for multiplier in (0x45D9F3B, 0x297A2D39, 0x119DE1F3):
        x = ((x >> 15) ^ x) * multiplier & mask
    # 24 bits are what fp32 holds exactly, so the largest score stays below 1.
    return ((x >> 7).float() / 2**24).expand(order.shape[0], -1).contiguous()


def grid_scores(coords: Tensor) -> Tensor:
    """`foveate::grid_scores`: the lowest bits of row and column decide first, equal ones before those that differ."""
    row, column = coords[..., 1], coords[..., 2]
    place = torch.zeros_like(row)
    for bit in range(BITS):
        r, c = row >> bit & 1, column >> bit & 1
        place = place * 4 + (r ^ c) * 2 + r
    return -place.float()


def places(x: Tensor) -> Tensor:
    """`foveate::places`."""
    return torch.arange(x.shape[1], device=x.device).repeat(len(x), 1)


def diverse_scores(x: Tensor, keep: float) -> Tensor:
    """`foveate::diverse_scores`: rows are picked from side by side."""
    count = x.shape[1]
    scores = torch.zeros(x.shape[:2], dtype=torch.float32, device=x.device)
    if not count:
        return scores
    picks = _farthest_first(normalize(x.float(), dim=-1), math.ceil(keep * count))
    values = 1 - torch.arange(picks.shape[1], device=x.device) / count
    return scores.scatter(1, picks, values.expand_as(picks))


def distinct_scores(row: Tensor, x: Tensor, keep: float, important: float) -> Tensor:
    """`foveate::distinct_scores`: rows are thinned out side by side."""
    total = math.floor(keep * row.shape[1])
    first = math.floor(important * total)
    ranked = row.argsort(dim=1, descending=True, stable=True)
    chosen, rest = ranked[:, :first], ranked[:, first:]
    unit = normalize(x.float(), dim=-1)
    while total > first and rest.shape[1] > total - first:
        even, odd = rest[:, ::2], rest[:, 1::2]
        going = min(ROUND, rest.shape[1] - (total - first), even.shape[1])
        a, b = (unit.gather(1, part[..., None].expand(-1, -1, unit.shape[2])) for part in (even, odd))
        alike = (a @ b.transpose(1, 2)).amax(2).argsort(dim=1, descending=True, stable=True)
        rest = torch.cat([even.gather(1, alike[:, going:]), odd], 1)
    if total > first:
        chosen = torch.cat([chosen, rest], 1)
    return torch.zeros_like(row).scatter(1, chosen, 1.0)


def _farthest_first(x: Tensor, count: int) -> Tensor:
    """Indices int64 [G, count] of unit vectors x [G, n, D]; `argmax` takes the first of several largest."""
    groups = torch.arange(len(x), device=x.device)
    picks = torch.empty(len(x), count, dtype=torch.int64, device=x.device)
    nearest = _nearest(x)
    for number in range(count):
        picks[:, number] = nearest.argmax(1)
        if number == 0:
            nearest = torch.full_like(nearest, math.inf)
        distance = 1 - (x @ x[groups, picks[:, number], :, None])[..., 0]
        nearest = torch.minimum(nearest, distance)
        nearest[groups, picks[:, number]] = -math.inf
    return picks


def _nearest(x: Tensor) -> Tensor:
    """Distance of each token to the nearest other one: [G, n].

    Each pair's distance is computed once and serves both: two tokens that are nearest to each other must tie
    exactly, so that the first of them wins on every machine.
    """
    blocks = x.split(BLOCK, 1)
    nearest = [x.new_full(block.shape[:2], math.inf) for block in blocks]
    for i, some in enumerate(blocks):
        for j, others in enumerate(blocks[: i + 1]):
            distance = 1 - some @ others.transpose(1, 2)
            if i == j:
                distance.diagonal(0, 1, 2).fill_(math.inf)
            nearest[i] = torch.minimum(nearest[i], distance.amin(2))
            nearest[j] = torch.minimum(nearest[j], distance.amin(1))
    return torch.cat(nearest, 1)
