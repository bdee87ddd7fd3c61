"""What the `foveate::` ops compute. Importing this package registers the implementations with torch.

Each op has a reference (`foveate.kernels.reference`), which is the oracle in plain, slow torch, and an
implementation that memory and time can afford. Gradients flow through all that return values of a floating type
(`foveate.kernels.gradients`), and mixed precision reaches them (`foveate.kernels.autocast`).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from foveate.kernels import (
    attention,
    counting,
    experts,
    fit,
    guided,
    kv,
    learned,
    linear,
    merging,
    relevance,
    scores,
    segments,
    statistics,
    tokens,
    tower,
)
from foveate.kernels.autocast import follow_autocast
from foveate.kernels.gradients import constant, differentiable
from foveate.kernels.neighbor import dispatch
from foveate.ops import LIBRARY

IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "attention": attention.attention,
    "neighbor_attention": dispatch.neighbor_attention,
    "linear": linear.linear,
    "experts": experts.experts,
    "encoder_attention": attention.encoder_attention,
    "varlen_attention": attention.varlen_attention,
    "attention_row": attention.attention_row,
    "top_tokens": tokens.top_tokens,
    "take_tokens": tokens.take_tokens,
    "random_scores": scores.random_scores,
    "grid_scores": scores.grid_scores,
    "places": scores.places,
    "diverse_scores": scores.diverse_scores,
    "distinct_scores": scores.distinct_scores,
    "relevance": relevance.relevance,
    "determinant_scores": relevance.determinant_scores,
    "visionzip": merging.visionzip,
    "prumerge": merging.prumerge,
    "raters": guided.raters,
    "rater_scores": guided.rater_scores,
    "rater_rank": guided.rater_rank,
    "rank_tokens": guided.rank_tokens,
    "recycle_tokens": guided.recycle_tokens,
    "merge_tokens": guided.merge_tokens,
    "dart_scores": guided.dart_scores,
    "cross_attention": learned.cross_attention,
    "mean_token": learned.mean_token,
    "decide": learned.decide,
    "weighted_attention": learned.weighted_attention,
    "attention_sums": kv.attention_sums,
    "attention_with_sums": kv.attention_with_sums,
    "neighbor_sums": kv.neighbor_sums,
    "window_tokens": kv.window_tokens,
    "snapkv_tokens": kv.snapkv_tokens,
    "heavy_tokens": kv.heavy_tokens,
    "take_keys": kv.take_keys,
    "tome": tower.tome,
    "join_tokens": tower.join_tokens,
    "received": tower.received,
    "column_means": tower.column_means,
    "segment_means": segments.segment_means,
    "segment_tokens": segments.segment_tokens,
    "crossget": tower.crossget,
    "cls_curve": tower.cls_curve,
    "padded_keys": tower.padded_keys,
    "received_attention": fit.received_attention,
    "attention_statistics": statistics.attention_statistics,
    "activity": statistics.activity,
    "divergence": statistics.divergence,
}

for _name, _implementation in IMPLEMENTATIONS.items():
    LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")

# In terms of other ops, so that compilers see into it and gradients need no rule.
LIBRARY.impl("residual", tokens.residual, "CompositeImplicitAutograd")

DIFFERENTIABLE = (
    "attention",
    "linear",
    "experts",
    "encoder_attention",
    "varlen_attention",
    "attention_row",
    "attention_with_sums",
    "take_tokens",
    "merge_tokens",
    "join_tokens",
    "prumerge",
    "cross_attention",
    "mean_token",
    "decide",
)

for _name in DIFFERENTIABLE:
    differentiable(_name, IMPLEMENTATIONS[_name])

for _name in IMPLEMENTATIONS.keys() - {*DIFFERENTIABLE, "neighbor_attention", "weighted_attention"}:
    constant(_name)

differentiable("neighbor_attention", dispatch.neighbor_attention, dispatch.triton_gradients)
differentiable("weighted_attention", learned.weighted_attention, learned.weighted_gradients)

FOLLOW_AUTOCAST = (
    *("attention", "linear", "neighbor_attention", "encoder_attention", "varlen_attention", "attention_row"),
    *("experts", "cross_attention", "weighted_attention", "attention_sums", "attention_with_sums", "neighbor_sums"),
)

for _name in FOLLOW_AUTOCAST:
    follow_autocast(_name)

for _name, _rule in counting.FLOPS.items():
    # So that `torch.utils.flop_counter` counts an optimized model as `foveate.cost` does.
    register_flop_formula(getattr(torch.ops.foveate, _name), get_raw=True)(_rule)

if torch.backends.mkldnn.is_available():
    register_flop_formula(torch.ops.mkldnn._linear_pointwise, get_raw=True)(counting.linear)
