"""Choosing visual tokens of images of any size, which stand one behind the other. `foveate.ops` explains the shapes."""

import math

import torch
from torch import Tensor

from foveate.ops.library import LIBRARY, fake
from foveate.ops.vision import distinct_pairs

LIBRARY.define("segment_means(Tensor q, Tensor k, Tensor cu_seqlens, float scale) -> Tensor")
segment_means = torch.ops.foveate.segment_means.default
"""What each patch gets of its own segment's attention, the mean over queries and heads: -> fp32 [n].

q, k, cu_seqlens and scale as in `varlen_attention`. The same as `column_means` of each segment alone."""


@fake("segment_means")
def _segment_means(q: Tensor, k: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[2], dtype=torch.float32)


LIBRARY.define(
    "segment_tokens(str by, Tensor x, Tensor? row, Tensor cu_seqlens, int patches, float keep, float share) -> Tensor"
)
segment_tokens = torch.ops.foveate.segment_tokens.default
"""Which tokens of each segment stay, floor(keep * n) of its n: bool [N].

x [N, D], of which each token is `patches` patches; cu_seqlens [segments + 1] counts patches. row: fp32 [N * patches],
summed over a token's patches. by: `row`, the highest; `distinct`, as `distinct_scores` chooses with `share` by the row;
`diverse`, as `diverse_scores`; `determinant`, as `determinant_scores` without relevance."""


@fake("segment_tokens")
def _segment_tokens(
    by: str, x: Tensor, row: Tensor | None, cu_seqlens: Tensor, patches: int, keep: float, share: float
) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.bool)


def segment_flops(by: str, count: int, width: int, keep: float, share: float) -> int:
    """What `segment_tokens` computes for a segment of so many tokens; as what chooses from one image does."""
    picks = math.ceil(keep * count)
    if by == "diverse":
        return 2 * width * count * (count + picks)
    if by == "determinant":
        return count * picks * (2 * width + picks - 1)
    return 2 * width * distinct_pairs(count, keep, share) if by == "distinct" else 0
