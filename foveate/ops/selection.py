"""Choosing visual tokens and taking them. `foveate.ops` explains the shapes."""

import math

import torch
from torch import Tensor

from foveate.ops.library import LIBRARY, fake

LIBRARY.define("attention_row(Tensor q, Tensor[] k, Tensor q_order, Tensor[] k_order, float scale) -> Tensor")
attention_row = torch.ops.foveate.attention_row.default
"""What a few queries pay to the first key stream: q [B, H, R, e], k list of [B, Hk, m_j, e] -> fp32 [B, H, R, m_0].

The softmax runs over every visible key of every stream."""


@fake("attention_row")
def _attention_row(q: Tensor, k: list[Tensor], q_order: Tensor, k_order: list[Tensor], scale: float) -> Tensor:
    return q.new_empty(*q.shape[:3], k[0].shape[2], dtype=torch.float32)


LIBRARY.define("top_tokens(Tensor scores, Tensor order, float keep, Tensor? whole=None) -> (Tensor, Tensor)")
top_tokens = torch.ops.foveate.top_tokens.default
"""The best tokens by (score, then lower index), in their old order.

scores fp32 [B, n], order int64 [B, n] -> index int64 [B, floor(keep * n)] and the kept tokens' order. A row with
n_b < n real tokens keeps floor(keep * n_b) of them; the slots left over point at token 0 with order `PAD`.
whole: the order of more tokens, of which these are left; `keep` is then a share of those, and at most all are kept."""


@fake("top_tokens")
def _top_tokens(scores: Tensor, order: Tensor, keep: float, whole: Tensor | None = None) -> tuple[Tensor, Tensor]:
    kept = math.floor(keep * (scores if whole is None else whole).shape[1])
    return order.new_empty(order.shape[0], kept), order.new_empty(order.shape[0], kept)


LIBRARY.define("take_tokens(Tensor x, Tensor index, int dim) -> Tensor")
take_tokens = torch.ops.foveate.take_tokens.default
"""x [B, ..., n at dim, ...] gathered along `dim` with index int64 [B, k]; B may be 1 in x."""


@fake("take_tokens")
def _take_tokens(x: Tensor, index: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[0], shape[dim] = index.shape[0], index.shape[1]
    return x.new_empty(shape)


LIBRARY.define("random_scores(Tensor order, int seed) -> Tensor")
random_scores = torch.ops.foveate.random_scores.default
"""Scores in [0, 1) that depend on the seed and each token's place in its stream only: order [B, n] -> fp32 [B, n]."""


@fake("random_scores")
def _random_scores(order: Tensor, seed: int) -> Tensor:
    return order.new_empty(order.shape, dtype=torch.float32)


LIBRARY.define("grid_scores(Tensor coords) -> Tensor")
grid_scores = torch.ops.foveate.grid_scores.default
"""Scores of which the best k, for any k, lie evenly over the image: coords int64 [B, n, 3] -> fp32 [B, n].

Row and column are read as binary numbers from their low ends: half of the tokens are a checkerboard, a quarter every
second row and column. Exact up to 4096 rows or columns."""


@fake("grid_scores")
def _grid_scores(coords: Tensor) -> Tensor:
    return coords.new_empty(coords.shape[:2], dtype=torch.float32)


LIBRARY.define("places(Tensor x) -> Tensor")
places = torch.ops.foveate.places.default
"""0 to n - 1 in every row: x [B, n, ...] -> int64 [B, n]."""


@fake("places")
def _places(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.int64)
