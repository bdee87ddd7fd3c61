"""The `foveate::` ops: schemas and what they return, without saying how they compute it.

Graphs refer to these ops; `foveate.kernels` implements them. Shapes use B (batch), I (images), H and Hk (query and
key heads), n (tokens), e (head size). An *order* tensor int64 [B, n] holds each token's place in its sequence;
a padded token has `PAD`, the largest int64. A query sees a key when the key's order is not larger than its own,
which gives causality and padding in one rule and survives any removal or reordering of tokens.
"""

from foveate.ops.core import (
    attention,
    attention_pairs,
    encoder_attention,
    linear,
    neighbor_attention,
    residual,
    varlen_attention,
)
from foveate.ops.experts import ACTIVATIONS, experts
from foveate.ops.fit import received_attention
from foveate.ops.guided import (
    cluster_count,
    dart_scores,
    merge_tokens,
    rank_tokens,
    rank_width,
    rater_rank,
    rater_scores,
    raters,
    recycle_tokens,
)
from foveate.ops.kv import (
    attention_sums,
    attention_with_sums,
    heavy_recent_count,
    heavy_tokens,
    neighbor_sums,
    snapkv_tokens,
    summed_pairs,
    take_keys,
    window_tokens,
)
from foveate.ops.learned import cross_attention, decide, mean_token, weighted_attention
from foveate.ops.library import BLOCK, FEW_QUERIES, LIBRARY, PAD
from foveate.ops.relevance import determinant_scores, relevance
from foveate.ops.segments import segment_flops, segment_means, segment_tokens
from foveate.ops.selection import attention_row, grid_scores, places, random_scores, take_tokens, top_tokens
from foveate.ops.statistics import activity, attention_statistics, divergence
from foveate.ops.tower import cls_curve, column_means, crossget, join_tokens, padded_keys, received, tome
from foveate.ops.vision import ROUND, distinct_pairs, distinct_scores, diverse_scores, prumerge, visionzip

__all__ = [
    "ACTIVATIONS",
    "BLOCK",
    "FEW_QUERIES",
    "LIBRARY",
    "PAD",
    "ROUND",
    "activity",
    "attention",
    "attention_pairs",
    "attention_row",
    "attention_statistics",
    "attention_sums",
    "attention_with_sums",
    "cls_curve",
    "cluster_count",
    "column_means",
    "cross_attention",
    "crossget",
    "dart_scores",
    "decide",
    "determinant_scores",
    "distinct_pairs",
    "distinct_scores",
    "divergence",
    "diverse_scores",
    "encoder_attention",
    "experts",
    "grid_scores",
    "heavy_recent_count",
    "heavy_tokens",
    "join_tokens",
    "linear",
    "mean_token",
    "merge_tokens",
    "neighbor_attention",
    "neighbor_sums",
    "padded_keys",
    "places",
    "prumerge",
    "random_scores",
    "rank_tokens",
    "rank_width",
    "rater_rank",
    "rater_scores",
    "raters",
    "received",
    "received_attention",
    "recycle_tokens",
    "relevance",
    "residual",
    "segment_flops",
    "segment_means",
    "segment_tokens",
    "snapkv_tokens",
    "summed_pairs",
    "take_keys",
    "take_tokens",
    "tome",
    "top_tokens",
    "varlen_attention",
    "visionzip",
    "weighted_attention",
    "window_tokens",
]
