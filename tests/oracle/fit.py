"""FitPrune as its paper says it, with lists: which tokens a layer deletes, and how many each layer may."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tests.oracle.masks import Before, Prune


def received(weights: Tensor, visual: list[int], behind: list[int]) -> tuple[list[float], list[float]]:
    """What each visual token gets from text behind the image, and from visual tokens; weights [H, S, S]."""
    most = weights.double().amax(0)
    cross = [sum(float(most[i, j]) for i in behind) / max(1, len(behind)) for j in visual]
    own = [sum(float(most[i, j]) for i in visual) / len(visual) for j in visual]
    return cross, own


def fitprune(layer: int, keep: float, of: int, heads: Tensor | None = None) -> Prune:
    """Behind the attention of `layer`, floor(keep * tokens that reach layer `of`) are left; heads: bool [L, H]."""

    def choice(before: Before) -> tuple[Tensor, None]:
        chosen = torch.zeros_like(before.alive)
        kept = slice(None) if heads is None else heads[layer]
        for row in range(len(chosen)):
            visual = before.visual[row].nonzero()[:, 0].tolist()
            alive = before.alive[row].nonzero()[:, 0].tolist()
            behind = [j for j in before.text[row].nonzero()[:, 0].tolist() if visual and j > visual[-1]]
            if alive:
                pairs = zip(*received(before.weights[row][kept], alive, behind), strict=True)
                score = dict(zip(alive, (cross * own for cross, own in pairs), strict=True))
                ranked = sorted(alive, key=lambda j: (-score[j], j))
                chosen[row, ranked[: math.floor(keep * int(before.reaching[of][row].sum()))]] = True
        return chosen, None

    return Prune(layer + 1, keep, "by", by=choice)


def scheduled(schedule: list[int], whole: int, heads: Tensor | None = None) -> tuple[Prune, ...]:
    """All deletions of a schedule for images of `whole` tokens; the last layer's do nothing."""
    stages = [layer for layer, count in enumerate(schedule[:-1]) if count]
    left, prunes = whole, []
    for layer in stages:
        left -= schedule[layer]
        prunes.append(fitprune(layer, (left + 1e-6) / whole, stages[0] + 1, heads))
    return tuple(prunes)


def spare(values: dict[int, float], alive: set[int], alpha: float) -> set[int]:
    """The longest list of the tokens with the least that leaves 1 - alpha of the mass of all."""
    left = sorted(alive, key=lambda j: (values[j], -j))
    gone: set[int] = set()
    while left and math.fsum(values[j] for j in left[1:]) >= (1 - alpha) * math.fsum(values.values()):
        gone.add(left.pop(0))
    return gone


Sample = list[tuple[list[float], list[float]]]
"""What each token gets from text and from visual tokens, layer by layer."""


def left_behind(sample: Sample, alpha: float) -> list[int]:
    """How many tokens each layer leaves."""
    alive, counts = set(range(len(sample[0][0]))), []
    for cross, own in sample:
        lists = [spare(dict(enumerate(values)), alive, alpha) for values in (cross, own)]
        alive = alive - (lists[0] & lists[1])
        counts.append(len(alive))
    return counts


def schedule(samples: list[Sample], budget: float, cost: Callable[[int, int], float], whole: int) -> list[int]:
    """Mean deletions at the alpha where a binary search in hundredths ends; cost: of a layer, by tokens in and out."""

    def spent(counts: list[int], start: int) -> float:
        return sum(cost(a, b) for a, b in zip([start, *counts], counts))

    def fits(alpha: float) -> bool:
        parts = [(len(s[0][0]), left_behind(s, alpha)) for s in samples]
        dense = sum(spent([n] * len(counts), n) for n, counts in parts)
        return sum(spent(counts, n) for n, counts in parts) <= budget * dense

    low, high = 0, 100
    while low < high:
        middle = (low + high) // 2
        if fits(middle / 100):
            high = middle
        else:
            low = middle + 1
    means = []
    for layer in range(len(samples[0])):
        shares = []
        for s in samples:
            counts = [len(s[0][0]), *left_behind(s, high / 100)]
            shares.append((counts[layer] - counts[layer + 1]) / counts[0])
        means.append(math.floor(sum(shares) / len(shares) * whole + 0.5))
    return means
