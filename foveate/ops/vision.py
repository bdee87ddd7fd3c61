"""What selections in the vision tower choose and merge. `foveate.ops` explains the shapes."""

import math

import torch
from torch import Tensor

from foveate.ops.library import LIBRARY, fake

LIBRARY.define("diverse_scores(Tensor x, float keep) -> Tensor")
diverse_scores = torch.ops.foveate.diverse_scores.default
"""Scores of tokens that differ from one another, by DivPrune's max-min rule (arXiv 2503.02175, algorithm 1).

x [I, n, D] -> fp32 [I, n]. In each row ceil(keep * n) tokens are picked: first the one whose nearest other token is
farthest by 1 - cosine, then ever the one that is farthest from its nearest picked one; the lower index in a tie. The
pick number p (from 0) scores 1 - p / n, all others 0."""


@fake("diverse_scores")
def _diverse_scores(x: Tensor, keep: float) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


LIBRARY.define("distinct_scores(Tensor row, Tensor x, float keep, float important) -> Tensor")
distinct_scores = torch.ops.foveate.distinct_scores.default
"""1 for the tokens that VisPruner keeps, 0 for others (arXiv 2412.01818, section 3): row [I, n], x [I, n, C] -> [I, n].

Of T = floor(keep * n) tokens the floor(important * T) with the highest `row` stay. From the others, in the order of
`row`, in each round up to 8 go that are most alike to another one: those at even places of the list are compared with
those at odd ones by cosine; what is left of the even ones, most alike first, then stands before the odd ones."""


@fake("distinct_scores")
def _distinct_scores(row: Tensor, x: Tensor, keep: float, important: float) -> Tensor:
    return torch.empty_like(row)


LIBRARY.define("visionzip(Tensor row, Tensor metric, int dominant, int contextual) -> (Tensor, Tensor)")
visionzip = torch.ops.foveate.visionzip.default
"""Dominant and contextual tokens (VisionZip, arXiv 2412.04467, section 3.2) as weights of all n tokens.

row fp32 [I, n], metric [I, n, e] -> weights fp32 [I, dominant + contextual, n], and the place in 0 to n - 1 that each
new token stands for. The `dominant` tokens with the highest row stand for themselves. Of the rest every s-th is a
target, s = rest // contextual; the others join the target that is most alike by cosine, and the mean of those who
joined is added to it."""


@fake("visionzip")
def _visionzip(row: Tensor, metric: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    images, count = row.shape
    width = dominant + contextual
    return row.new_empty(images, width, count), row.new_empty(images, width, dtype=torch.int64)


LIBRARY.define("prumerge(Tensor row, Tensor metric, float? keep, bool plus, int neighbors) -> (Tensor, Tensor, Tensor)")
prumerge = torch.ops.foveate.prumerge.default
"""PruMerge's tokens (arXiv 2403.15388, section 3) as weights of all n tokens.

row fp32 [I, n], what the CLS token pays; metric [I, n, e] -> weights fp32 [I, k, n], places int64 [I, k], count [I].
An image keeps the tokens whose row lies above the third quartile by more than 1.5 times the interquartile range
(keep None: then k = n), or floor(keep * n) - 1 = k - 1, by falling row. `plus` adds a uniform sample in the order
of the image: every s-th place but the last, s = n // kept // 3; with a `keep`, half of it. To each the `neighbors` most
alike tokens are added, times their row; behind the kept ones stands the sum of all that go, times their row, if any."""


@fake("prumerge")
def _prumerge(
    row: Tensor, metric: Tensor, keep: float | None, plus: bool, neighbors: int
) -> tuple[Tensor, Tensor, Tensor]:
    images, count = row.shape
    width = count if keep is None else math.floor(keep * count)
    places = row.new_empty(images, width, dtype=torch.int64)
    return row.new_empty(images, width, count), places, places.new_empty(images)


ROUND = 8
"""Tokens that go in one round of `distinct_scores`."""


def distinct_pairs(count: int, keep: float, important: float) -> int:
    """Pairs of tokens that `distinct_scores` compares in all its rounds, for an image of so many tokens."""
    total = math.floor(keep * count)
    wanted = total - math.floor(important * total)
    rest, pairs = count - (total - wanted), 0
    while rest > wanted > 0:
        even = (rest + 1) // 2
        pairs += even * (rest - even)
        rest -= min(ROUND, rest - wanted, even)
    return pairs
