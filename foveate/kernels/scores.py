"""Scores by which visual tokens are chosen, other than attention's."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.ops import PAD

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


def diverse_scores(x: Tensor, order: Tensor, coords: Tensor, keep: float) -> Tensor:
    """`foveate::diverse_scores`: images of the same number of tokens are picked from side by side."""
    scores = torch.zeros(order.shape, dtype=torch.float32, device=order.device)
    for places in images_by_size(order, coords):
        rows, index = places[:, 0, None], places[:, 1:]
        count = index.shape[1]
        picks = _farthest_first(normalize(x[rows, index].float(), dim=-1), math.ceil(keep * count))
        values = 1 - torch.arange(picks.shape[1], device=x.device) / count
        scores[rows, index.gather(1, picks)] = values
    return scores


def images_by_size(order: Tensor, coords: Tensor) -> list[Tensor]:
    """For each number of tokens that an image has: int64 [images, 1 + tokens], batch row and columns of its tokens."""
    found: dict[int, list[list[int]]] = {}
    image = torch.where(order == PAD, -1, coords[..., 0]).tolist()
    for row, numbers in enumerate(image):
        for number in dict.fromkeys(n for n in numbers if n >= 0):
            columns = [column for column, n in enumerate(numbers) if n == number]
            found.setdefault(len(columns), []).append([row, *columns])
    return [torch.tensor(places, device=order.device) for places in found.values()]


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
