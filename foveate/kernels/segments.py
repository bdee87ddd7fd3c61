"""Choosing tokens in each segment of a packed sequence, by what chooses them of one image."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from foveate.kernels.relevance import determinant_scores
from foveate.kernels.scores import distinct_scores, diverse_scores, places
from foveate.kernels.tokens import top_tokens
from foveate.kernels.tower import column_means


@torch.no_grad()
def segment_means(q: Tensor, k: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """`foveate::segment_means`."""
    parts = [column_means(q[:, :, start:end], k[:, :, start:end], scale)[0] for start, end in _bounds(cu_seqlens)]
    return torch.cat(parts) if parts else q.new_zeros(0, dtype=torch.float32)


@torch.no_grad()
def segment_tokens(
    by: str, x: Tensor, row: Tensor | None, cu_seqlens: Tensor, patches: int, keep: float, share: float
) -> Tensor:
    """`foveate::segment_tokens`."""
    kept = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for start, end in _bounds(cu_seqlens // patches):
        tokens = x[None, start:end]
        received = None
        if row is not None:
            received = row[start * patches : end * patches].view(1, -1, patches).sum(2)
        index, _ = top_tokens(_scores(by, tokens, received, keep, share), places(tokens), keep)
        kept[start + index[0]] = True
    return kept


def _scores(by: str, x: Tensor, row: Tensor | None, keep: float, share: float) -> Tensor:
    if by == "diverse":
        return diverse_scores(x, keep)
    if by == "determinant":
        return determinant_scores(x, None, keep)
    assert row is not None, f"{by} looks at a row"
    return distinct_scores(row, x, keep, share) if by == "distinct" else row


def _bounds(cu_seqlens: Tensor) -> Iterator[tuple[int, int]]:
    """Where segments that are not empty begin and end."""
    return ((start, end) for start, end in itertools.pairwise(cu_seqlens.tolist()) if start < end)
