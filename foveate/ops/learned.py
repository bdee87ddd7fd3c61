"""What trained selections compute, at inference and while they are trained. `foveate.ops` explains the shapes."""

import torch
from torch import Tensor

from foveate.ops.library import LIBRARY, fake

LIBRARY.define("cross_attention(Tensor q, Tensor k, Tensor v, Tensor until, Tensor k_order, float scale) -> Tensor")
cross_attention = torch.ops.foveate.cross_attention.default
"""Every query of one stream attends to the same keys of another: q [B, H, n, e], k, v [B, H, m, e] -> [B, n, H, e].

k_order int64 [B, m]; until int64 [B, 1]: keys whose order is larger are not seen, nor is padding. Where a query stands
does not matter."""


@fake("cross_attention")
def _cross_attention(q: Tensor, k: Tensor, v: Tensor, until: Tensor, k_order: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


LIBRARY.define("mean_token(Tensor x, Tensor order, Tensor? weights=None) -> Tensor")
mean_token = torch.ops.foveate.mean_token.default
"""The mean of a stream's tokens that are not padding: x [B, n, D], order [B, n] -> [B, 1, D]; 0 where there is none.

weights: fp32 [B, n], how much each counts."""


@fake("mean_token")
def _mean_token(x: Tensor, order: Tensor, weights: Tensor | None = None) -> Tensor:
    return x.new_empty(x.shape[0], 1, x.shape[2])


LIBRARY.define("decide(Tensor scores, Tensor noise, Tensor? before=None) -> Tensor")
decide = torch.ops.foveate.decide.default
"""Which tokens stay while a selection is trained: scores fp32 [B, n], noise fp32 [B, n] -> fp32 [B, n], 1 or 0.

A token stays where score + noise is above 0, and stayed `before`. The gradient is that of sigmoid(score + noise) *
before. With logistic noise this is the first column of a hard straight-through Gumbel-softmax of temperature 1 over
two logits whose difference is the score."""


@fake("decide")
def _decide(scores: Tensor, noise: Tensor, before: Tensor | None = None) -> Tensor:
    return scores.new_empty(scores.shape, dtype=torch.float32)


LIBRARY.define(
    "weighted_attention(Tensor q, Tensor[] k, Tensor[] v, Tensor q_order, Tensor[] k_order, Tensor weights,"
    " float scale) -> Tensor"
)
weighted_attention = torch.ops.foveate.weighted_attention.default
"""Causal attention in which visual keys count as much as their weights: exp(A) M / sum of exp(A) M (LVPruning, eq. 9).

q [B, H, n, e], q_order [B, n]; k, v [B, Hk, m, e] and k_order: the visual keys, then the text keys; weights fp32
[B, m of the visual keys], 0 or more. M is the weight for a visual key, 1 for a text key and for the query's own.
Returns [B, n, H, e]. Gradients flow to weights that are 0, too."""


@fake("weighted_attention")
def _weighted_attention(
    q: Tensor,
    k: list[Tensor],
    v: list[Tensor],
    q_order: Tensor,
    k_order: list[Tensor],
    weights: Tensor,
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
