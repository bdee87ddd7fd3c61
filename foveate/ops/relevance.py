"""What selections in the vision tower ask of a question. `foveate.ops` explains the shapes."""

import torch
from torch import Tensor

from foveate.ops.library import LIBRARY, fake

LIBRARY.define("relevance(Tensor x, Tensor question) -> Tensor")
relevance = torch.ops.foveate.relevance.default
"""How much tokens matter to a question (CDPruner, arXiv 2506.10967): x [I, n, P], question [I, P] -> fp32 [I, n].

The negative of x's cosine times the question, which is a mean of unit vectors; then, in each row, (value - least + e) /
(most - least + e), e = 1e-6: above 0, at most 1."""


@fake("relevance")
def _relevance(x: Tensor, question: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


LIBRARY.define("determinant_scores(Tensor x, Tensor? relevance, float keep, float? theta=None) -> Tensor")
determinant_scores = torch.ops.foveate.determinant_scores.default
"""Scores of tokens that matter and differ, by greedy maximum of a determinant (CDPruner, arXiv 2506.10967).

x [I, n, D], relevance r fp32 [I, n], above 0 (None: 1 for all) -> fp32 [I, n]. Of K_ij = r_i cos(x_i, x_j) r_j,
ceil(keep * n) tokens are picked in each row: ever the one that multiplies the determinant of the picked ones' K by
most; the lower index in a tie. What multiplies it by less than 1e-5 of its own K_jj multiplies it by 0. The pick p
(from 0) scores 1 - p / n, all others 0. theta: r becomes exp(theta * r / (2 (1 - theta))) first."""


@fake("determinant_scores")
def _determinant_scores(x: Tensor, relevance: Tensor | None, keep: float, theta: float | None = None) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)
