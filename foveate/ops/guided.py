"""What selections that the text guides choose and merge. `foveate.ops` explains the shapes."""

import math
from typing import Any

import torch
from torch import Tensor

from foveate.ops.library import LIBRARY, fake

LIBRARY.define("raters(Tensor visual, Tensor text, Tensor visual_order, Tensor text_order) -> Tensor")
raters = torch.ops.foveate.raters.default
"""Which text tokens judge visual ones (SparseVLM, arXiv 2410.04417, section 3.2): fp32 [B, m], 1 or 0.

visual [B, n, D] and text [B, m, D] embeddings with their orders. Of the text behind the last image, those tokens whose
mean over visual tokens of softmax over that text of visual times text is above the average."""


@fake("raters")
def _raters(visual: Tensor, text: Tensor, visual_order: Tensor, text_order: Tensor) -> Tensor:
    return text.new_empty(text_order.shape, dtype=torch.float32)


LIBRARY.define(
    "rater_scores(Tensor q, Tensor[] k, Tensor q_order, Tensor[] k_order, Tensor chosen, float scale) -> Tensor"
)
rater_scores = torch.ops.foveate.rater_scores.default
"""What chosen queries pay to the first key stream, mean over them and over heads: -> fp32 [B, m_0].

q, k and orders as in `attention_row`; chosen fp32 [B, R], 1 or 0. Zero in a row where none is chosen."""


@fake("rater_scores")
def _rater_scores(
    q: Tensor, k: list[Tensor], q_order: Tensor, k_order: list[Tensor], chosen: Tensor, scale: float
) -> Tensor:
    return q.new_empty(q.shape[0], k[0].shape[2], dtype=torch.float32)


LIBRARY.define(
    "recycle_tokens(Tensor scores, Tensor order, Tensor x, Tensor whole, float keep) -> (Tensor, Tensor, Tensor)"
)
recycle_tokens = torch.ops.foveate.recycle_tokens.default
"""The best tokens, and some of the others as clusters (SparseVLM, arXiv 2410.04417, section 3.4).

scores fp32 [B, n], order int64 [B, n], x [B, n, D]; whole: the order of all tokens that `keep` is a share of. Of a
row's n_b tokens floor(keep * whole) stay; of the g that go, the 3 g // 10 + 1 best become C = (3 g // 10 + 1) // 10 + 1
clusters around density peaks. -> index int64 [B, k] of those that stay and of the peaks, in their old order, their
order, and weights fp32 [B, k, n]: a token that stays is itself, a peak the mean of its cluster."""


@fake("recycle_tokens")
def _recycle_tokens(
    scores: Tensor, order: Tensor, x: Tensor, whole: Tensor, keep: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count = order.shape
    stay = math.floor(keep * whole.shape[1])
    width = stay + cluster_count(count - stay)
    index = order.new_empty(batch, width)
    return index, torch.empty_like(index), scores.new_empty(batch, width, count)


LIBRARY.define(
    "rater_rank(Tensor q, Tensor[] k, Tensor q_order, Tensor[] k_order, Tensor chosen, float scale) -> Tensor"
)
rater_rank = torch.ops.foveate.rater_rank.default
"""The rank of what chosen queries pay to the first key stream, mean over heads: int64 [B]; arguments as `rater_scores`.

Singular values in fp64 count when they are above the largest, times the larger side of the matrix without padding,
times the spacing of fp32 at 1."""


@fake("rater_rank")
def _rater_rank(
    q: Tensor, k: list[Tensor], q_order: Tensor, k_order: list[Tensor], chosen: Tensor, scale: float
) -> Tensor:
    return q.new_empty(q.shape[0], dtype=torch.int64)


LIBRARY.define(
    "rank_tokens(Tensor scores, Tensor order, Tensor x, Tensor rank, Tensor text_order, float scale, bool recycle)"
    " -> (Tensor, Tensor, Tensor)"
)
rank_tokens = torch.ops.foveate.rank_tokens.default
"""As `recycle_tokens`, where of a row's n_b tokens floor(scale * (n_b - rank_b)) go (SparseVLM, section 3.3).

rank int64 [B], at most the text tokens, order [B, m], that asked: k is `rank_width`, room for what the largest such
rank would leave of n and for clusters; slots left over point at token 0 with order `PAD`. Without `recycle` there are
no clusters."""


@fake("rank_tokens")
def _rank_tokens(
    scores: Tensor, order: Tensor, x: Tensor, rank: Tensor, text_order: Tensor, scale: float, recycle: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count = order.shape
    width = rank_width(count, text_order.shape[1], scale, recycle)
    index = order.new_empty(batch, width)
    return index, torch.empty_like(index), scores.new_empty(batch, width, count)


LIBRARY.define("merge_tokens(Tensor x, Tensor weights) -> Tensor")
merge_tokens = torch.ops.foveate.merge_tokens.default
"""Weighted sums of tokens: x [B, n, D], weights [B, k, n] -> [B, k, D]."""


@fake("merge_tokens")
def _merge_tokens(x: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[1], x.shape[2])


LIBRARY.define(
    "dart_scores(Tensor keys, Tensor x, Tensor order, Tensor text_keys, Tensor text, Tensor text_order, float keep,"
    " int pivots) -> Tensor"
)
dart_scores = torch.ops.foveate.dart_scores.default
"""Scores of tokens that are least alike to a few pivots (DART, arXiv 2502.11494, section 3), the first pick highest.

keys [B, Hk, n, e], x [B, n, D] and order of visual tokens, the same of text tokens -> fp32 [B, n]. Pivots are the
`pivots` tokens with the largest keys by the sum of absolute values, of the image and of the text behind it. Of a row's
n_b visual tokens floor(keep * n_b) are picked: the visual pivots, then for each pivot an equal part of the rest, those
left with the lowest cosine to it. All others score 0."""


@fake("dart_scores")
def _dart_scores(
    keys: Tensor,
    x: Tensor,
    order: Tensor,
    text_keys: Tensor,
    text: Tensor,
    text_order: Tensor,
    keep: float,
    pivots: int,
) -> Tensor:
    return x.new_empty(order.shape, dtype=torch.float32)


def rank_width(count: Any, text: Any, scale: float, recycle: bool) -> Any:
    """Tokens that `rank_tokens` has room for: a rank is at most the number of text tokens (also symbolic numbers).

    A bound that names `count` twice, since stages put one into the next: of what goes, 3% and up to two more come back
    as clusters, and roundings take one token each.
    """
    share = 0.97 * scale if recycle else scale
    return torch.sym_min(count, math.floor((1 - share) * count) + math.floor(share * text) + (4 if recycle else 2))


def cluster_count(gone: Any) -> Any:
    """Clusters that `recycle_tokens` makes of so many tokens that go (also a symbolic number); none of none."""
    return torch.sym_min((gone * 3 // 10 + 1) // 10 + 1, gone)
