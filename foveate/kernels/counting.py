"""FLOPs of the `foveate::` ops for `torch.utils.flop_counter`: the products that the implementations here make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from foveate.kernels.neighbor.dispatch import planned
from foveate.ops import attention_pairs, segment_flops, summed_pairs


def _attention(
    q: list[Tensor],
    k: list[Tensor],
    v: Any,
    q_order: Any,
    k_order: Any,
    prefix: int,
    layout: str,
    scale: float,
    reach: Any = None,
    window: int = 0,
    **also: Any,
) -> int:
    batch, heads, _, size = q[0].shape
    queries, keys = ([x.shape[2] for x in xs] for xs in (q, k))
    known = prefix if reach is None and not window else -1
    return 4 * batch * heads * size * attention_pairs(queries, keys, layout, known)[0]


def _neighbor_attention(
    q: Tensor,
    k: list[Tensor],
    v: Any,
    q_order: Any,
    k_order: Any,
    coords: Any,
    grids: Tensor,
    radius: int,
    metric: str,
    causal: bool,
    *rest: Any,
    **also: Any,
) -> int:
    # The form decides how many pairs are computed, and the grids' values decide the form.
    return 4 * q.shape[1] * q.shape[3] * planned(q, k, grids, radius, metric, causal).pairs


def _encoder_attention(q: Tensor, k: Tensor, *rest: Any, **also: Any) -> int:
    return 4 * q.numel() * k.shape[2]


def _varlen_attention(q: Tensor, k: Tensor, v: Any, cu_seqlens: Tensor, *rest: Any, **also: Any) -> int:
    lengths = cu_seqlens.diff()
    return 4 * q.shape[1] * q.shape[3] * int((lengths * lengths).sum())


def _segment_means(q: Tensor, k: Tensor, cu_seqlens: Tensor, *rest: Any, **also: Any) -> int:
    return _varlen_attention(q, k, None, cu_seqlens) // 2


def _segment_tokens(
    by: str, x: Tensor, row: Any, cu_seqlens: Tensor, patches: int, keep: float, share: float, **also: Any
) -> int:
    lengths = (cu_seqlens // patches).diff().tolist()
    return sum(segment_flops(by, length, x.shape[1], keep, share) for length in lengths)


def _row(q: Tensor, k: list[Tensor], *rest: Any, **also: Any) -> int:
    return 2 * q.numel() * sum(x.shape[2] for x in k)


def _attention_with_sums(
    q: list[Tensor], k: list[Tensor], v: Any, q_order: Any, k_order: Any, prefix: int, *rest: Any, **also: Any
) -> int:
    batch, heads, _, size = q[0].shape
    queries, keys = (sum(x.shape[2] for x in xs) for xs in (q, k))
    return 4 * batch * heads * size * summed_pairs(queries, keys, prefix)


def _diverse(x: Tensor, keep: float, *rest: Any, **also: Any) -> int:
    images, n, width = x.shape
    return images * segment_flops("diverse", n, width, keep, 0.0)


def _distinct(row: Any, x: Tensor, keep: float, important: float, *rest: Any, **also: Any) -> int:
    images, n, width = x.shape
    return images * segment_flops("distinct", n, width, keep, important)


def _relevance(x: Tensor, *rest: Any, **also: Any) -> int:
    return 2 * x.numel()


def _determinant(x: Tensor, relevance: Any, keep: float, *rest: Any, **also: Any) -> int:
    images, n, width = x.shape
    return images * segment_flops("determinant", n, width, keep, 0.0)


def _visionzip(row: Any, metric: Tensor, dominant: int, contextual: int, *rest: Any, **also: Any) -> int:
    images, n, width = metric.shape
    return 2 * images * width * contextual * (n - dominant - contextual)


def _prumerge(row: Any, metric: Tensor, *rest: Any, **also: Any) -> int:
    images, n, width = metric.shape
    return 2 * images * width * n * n


def _raters(visual: Tensor, text: Tensor, *rest: Any, **also: Any) -> int:
    return 2 * visual.numel() * text.shape[1]


def _rater_scores(q: Tensor, k: list[Tensor], *rest: Any, **also: Any) -> int:
    batch, heads, rows, size = q.shape
    return 2 * batch * rows * (heads * size * sum(x.shape[2] for x in k) + k[0].shape[2])


def _merge(x: Tensor, weights: Tensor, *rest: Any, **also: Any) -> int:
    return 2 * x.numel() * weights.shape[1]


def _cross_attention(q: Tensor, k: Tensor, *rest: Any, **also: Any) -> int:
    return 4 * q.numel() * k.shape[2]


def _mean(x: Tensor, *rest: Any, **also: Any) -> int:
    return 2 * x.numel()


def _weighted_attention(q: Tensor, k: list[Tensor], *rest: Any, **also: Any) -> int:
    return 4 * q.numel() * sum(x.shape[2] for x in k)


def _tome(keys: Tensor, *rest: Any, **also: Any) -> int:
    images, _, n, width = keys.shape
    return 2 * images * width * (n // 2) * (n - n // 2)


def _received(q: Tensor, *rest: Any, **also: Any) -> int:
    return 2 * q.numel() * q.shape[2]


def _crossget(keys: Tensor, *rest: Any, **also: Any) -> int:
    images, _, n, width = keys.shape
    return 6 * images * width * n * n


def _cls_curve(x: Tensor, *rest: Any, **also: Any) -> int:
    images, n, width = x.shape
    return 2 * images * (n - 1) * width


def linear(x: Tensor, weight: Tensor, *rest: Any, **also: Any) -> int:
    """Of a linear, oneDNN's too, which `torch.utils.flop_counter` does not know."""
    return 2 * x.numel() * weight.shape[0]


def _experts(x: Tensor, logits: Any, gate_up: Tensor, down: Tensor, chosen: int, *rest: Any, **also: Any) -> int:
    return 6 * x.numel() * chosen * down.shape[2]


FLOPS: dict[str, Callable[..., int]] = {
    "linear": linear,
    "experts": _experts,
    "attention": _attention,
    "neighbor_attention": _neighbor_attention,
    "encoder_attention": _encoder_attention,
    "varlen_attention": _varlen_attention,
    "attention_row": _row,
    "attention_sums": _row,
    "attention_with_sums": _attention_with_sums,
    "neighbor_sums": _row,
    "received_attention": _row,
    "diverse_scores": _diverse,
    "distinct_scores": _distinct,
    "relevance": _relevance,
    "determinant_scores": _determinant,
    "visionzip": _visionzip,
    "prumerge": _prumerge,
    "raters": _raters,
    "rater_scores": _rater_scores,
    "rater_rank": _row,
    "merge_tokens": _merge,
    "cross_attention": _cross_attention,
    "mean_token": _mean,
    "weighted_attention": _weighted_attention,
    "tome": _tome,
    "received": _received,
    "column_means": _received,
    "segment_means": _segment_means,
    "segment_tokens": _segment_tokens,
    "crossget": _crossget,
    "cls_curve": _cls_curve,
}
"""Op -> rule; rules take the op's own arguments."""
