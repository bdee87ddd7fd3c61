"""Choosing tokens that matter to a question and differ from one another; all in fp32."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

LEAST = 1e-6
"""Relevance of the token that matters least."""

ROUNDING = 1e-5
"""A token adds nothing new when less than this share of it is new."""


def relevance(x: Tensor, question: Tensor) -> Tensor:
    """`foveate::relevance`."""
    values = -(normalize(x.float(), dim=-1) @ question.float()[..., None])[..., 0]
    if not values.shape[1]:
        return values
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    return (values - low + LEAST) / (high - low + LEAST)


def determinant_scores(x: Tensor, relevance: Tensor | None, keep: float, theta: float | None = None) -> Tensor:
    """`foveate::determinant_scores`: a Cholesky factor grows by a column a pick, and no n x n matrix is made."""
    images, count = x.shape[:2]
    weight = weighed(x.new_ones(images, count, dtype=torch.float32) if relevance is None else relevance, theta)
    unit = normalize(x.float(), dim=-1)
    scores = torch.zeros_like(weight)
    own = weight.square()
    gains = own  # what each token would multiply the determinant by; of picked ones minus infinity
    columns = own.new_zeros(images, math.ceil(keep * count), count)
    rows = torch.arange(images, device=x.device)
    for number in range(columns.shape[1]):
        best = gains.argmax(1)
        scores[rows, best] = 1 - number / count
        gain = gains[rows, best, None]
        similar = weight[rows, best, None] * (unit @ unit[rows, best, :, None])[..., 0] * weight
        known = (columns[:, :number].transpose(1, 2) @ columns[rows, :number, best][..., None])[..., 0]
        columns[:, number] = torch.where(gain > 0, (similar - known) / gain.sqrt(), 0.0)
        gains = gains - columns[:, number].square()
        gains = torch.where((gains < ROUNDING * own) & (gains > -math.inf), 0.0, gains)
        gains[rows, best] = -math.inf
    return scores


def weighed(relevance: Tensor, theta: float | None) -> Tensor:
    """Relevance as the kernel takes it."""
    return relevance if theta is None else (theta * relevance / (2 * (1 - theta))).exp()
