"""The oracle of every kernel: the shortest torch that says what the op means, in float64, S x S tensors allowed."""

from foveate.kernels.reference.attention import (
    activity,
    attention,
    attention_row,
    attention_statistics,
    column_means,
    divergence,
    encoder_attention,
    probabilities,
    received,
    received_attention,
    varlen_attention,
)
from foveate.kernels.reference.merging import cls_curve, crossget, tome
from foveate.kernels.reference.selecting import (
    determinant_scores,
    distinct_scores,
    diverse_scores,
    grid_scores,
    prumerge,
    relevance,
    top_tokens,
    visionzip,
)

__all__ = [
    "activity",
    "attention",
    "attention_row",
    "attention_statistics",
    "cls_curve",
    "column_means",
    "crossget",
    "determinant_scores",
    "distinct_scores",
    "divergence",
    "diverse_scores",
    "encoder_attention",
    "grid_scores",
    "probabilities",
    "prumerge",
    "received",
    "received_attention",
    "relevance",
    "tome",
    "top_tokens",
    "varlen_attention",
    "visionzip",
]
