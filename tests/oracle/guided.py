"""SparseVLM's and DART's choices, with lists, for the masked oracle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.oracle.masks import Before, Choice


def _behind(before: Before, row: int) -> list[int]:
    """The text tokens behind the last visual one."""
    visual = before.visual[row].nonzero()[:, 0].tolist()
    return [j for j in before.text[row].nonzero()[:, 0].tolist() if visual and j > visual[-1]]


def raters(visual: Tensor, text: Tensor) -> list[int]:
    """Of text tokens [m, D] those that visual ones [n, D] look at more than at the average one."""
    mean = torch.stack([torch.softmax(text @ one, 0) for one in visual]).mean(0)
    return [j for j in range(len(text)) if mean[j] > mean.mean()]


def clusters(points: Tensor, count: int) -> dict[int, list[int]]:
    """Peak -> the points [n, D] around it, itself among them (SparseVLM's density peaks; ties to the first)."""
    n = len(points)
    distance = [[float((a - b).norm()) / math.sqrt(points.shape[1]) for b in points] for a in points]
    density = [math.exp(-sum(d * d for d in sorted(row)[:count]) / count) for row in distance]
    longest = max(map(max, distance))
    peak = []
    for i in range(n):
        denser = [j for j in range(n) if density[j] > density[i] or (density[j] == density[i] and j < i)]
        peak.append(min((distance[i][j] for j in denser), default=longest))
    centres = sorted(sorted(range(n), key=lambda i: (-peak[i] * density[i], i))[:count])
    found: dict[int, list[int]] = {centre: [] for centre in centres}
    for i in range(n):
        found[i if i in found else min(centres, key=lambda c: (distance[i][c], c))].append(i)
    return found


def rank(rows: Tensor) -> int:
    """Of [R, n]: the singular values that stand above rounding in fp32."""
    values = torch.linalg.svdvals(rows.double()).tolist()
    return sum(v > max(values) * max(rows.shape) * 2**-23 for v in values)


def sparsevlm(keep: float, of: int, recycle: bool = True, scale: float | None = None) -> Choice:
    """floor(keep * visual tokens that reach layer `of`) by the raters, and clusters of others.

    scale: all but floor(scale * (alive tokens - rank of what the raters pay to them)) instead.
    """

    def choice(before: Before) -> tuple[Tensor, Tensor | None]:
        chosen = torch.zeros_like(before.alive)
        mix = torch.eye(before.hidden.shape[1]).repeat(len(before.hidden), 1, 1)
        for row in range(len(chosen)):
            alive = before.alive[row].nonzero()[:, 0].tolist()
            behind = _behind(before, row)
            visual = before.embeddings[row, before.visual[row]]
            asking = [behind[j] for j in raters(visual, before.embeddings[row, behind])] if behind else []
            score = before.weights[row][:, asking].mean((0, 1)) if asking else torch.zeros(before.hidden.shape[1])
            ranked = sorted(alive, key=lambda j: (-float(score[j]), j))
            stay = ranked[: math.floor(keep * int(before.reaching[of][row].sum()))]
            if scale is not None:
                rows = before.weights[row][:, asking][..., alive].mean(0)
                gone = math.floor(scale * (len(alive) - (rank(rows) if asking and alive else 0)))
                stay = ranked[: len(alive) - gone]
            chosen[row, stay] = True
            gone = ranked[len(stay) :]
            if not recycle or not gone:
                continue
            best = sorted(gone[: 3 * len(gone) // 10 + 1])
            for centre, members in clusters(before.hidden[row, best], len(best) // 10 + 1).items():
                chosen[row, best[centre]] = True
                mix[row, best[centre]] = 0
                mix[row, best[centre], [best[m] for m in members]] = 1 / len(members)
        return chosen, mix if recycle else None

    return choice


def _largest(size: Tensor, places: list[int]) -> list[int]:
    return sorted(places, key=lambda j: (-float(size[j]), j))


def dart(keep: float, weight: Tensor, pivots: int = 4) -> Choice:
    """floor(keep * n) tokens: pivots, and for each pivot those least alike to it; weight [D]: of the last norm."""

    def choice(before: Before) -> tuple[Tensor, Tensor | None]:
        chosen = torch.zeros_like(before.alive)
        size = before.keys.abs().sum((1, 3))
        for row in range(len(chosen)):
            alive = before.alive[row].nonzero()[:, 0].tolist()
            total = math.floor(keep * len(alive))
            own = _largest(size[row], alive)[:pivots][:total]
            asking = own + _largest(size[row], _behind(before, row))[:pivots]
            unit = torch.nn.functional.normalize(before.hidden[row] * weight, dim=-1)
            left = [j for j in alive if j not in own]
            picked, wanted = list(own), total - len(own)
            for number, pivot in enumerate(asking):
                share = wanted // len(asking) + (number < wanted % len(asking))
                new = sorted(left, key=lambda j: (float(unit[j] @ unit[pivot]), j))[:share]
                left = [j for j in left if j not in new]
                picked += new
            chosen[row, picked] = True
        return chosen, None

    return choice
