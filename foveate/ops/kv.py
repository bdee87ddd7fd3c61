"""What leaves a cache of keys and values, and what that is decided by. `foveate.ops` explains the shapes."""

import math
from typing import Any

import torch
from torch import Tensor

from foveate.ops.library import LIBRARY, fake

ROWS = 64
"""Queries whose rows are held at once, for every head."""

LIBRARY.define("attention_sums(Tensor q, Tensor[] k, Tensor q_order, Tensor[] k_order, float scale) -> Tensor")
attention_sums = torch.ops.foveate.attention_sums.default
"""What queries pay to each key, summed over them and over the heads that share a key head: -> fp32 [B, Hk, sum m_j].

q [B, H, n, e], k list of [B, Hk, m_j, e]. The softmax runs over every visible key of every stream; padding pays
nothing. Exact, in blocks of queries."""


@fake("attention_sums")
def _attention_sums(q: Tensor, k: list[Tensor], q_order: Tensor, k_order: list[Tensor], scale: float) -> Tensor:
    return q.new_empty(q.shape[0], k[0].shape[1], sum(x.shape[2] for x in k), dtype=torch.float32)


LIBRARY.define(
    "attention_with_sums(Tensor[] q, Tensor[] k, Tensor[] v, Tensor[] q_order, Tensor[] k_order, SymInt prefix,"
    " str layout, float scale) -> (Tensor, Tensor)"
)
attention_with_sums = torch.ops.foveate.attention_with_sums.default
"""`attention` of a whole layer, "vt:vt", and what all of its queries pay to each key, as `attention_sums` has it.

Rows of weights serve both, so that the sums cost no product of queries and keys of their own."""


@fake("attention_with_sums")
def _attention_with_sums(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_order: list[Tensor],
    k_order: list[Tensor],
    prefix: int,
    layout: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, heads, _, size = q[0].shape
    queries, keys = (sum(x.shape[2] for x in xs) for xs in (q, k))
    sums = q[0].new_empty(batch, k[0].shape[1], keys, dtype=torch.float32)
    return q[0].new_empty(batch, queries, heads, size), sums


def summed_pairs(queries: int, keys: int, prefix: int) -> int:
    """Query-key pairs of one head that a call of `attention_with_sums` computes: blocks of a causal square, or all."""
    if prefix < 0:
        return queries * keys
    ends = [min(start + ROWS, queries) for start in range(0, queries, ROWS)]
    return sum((end - start) * end for start, end in zip(range(0, queries, ROWS), ends, strict=True))


LIBRARY.define(
    "neighbor_sums(Tensor q, Tensor[] k, Tensor q_order, Tensor[] k_order, Tensor q_coords, Tensor coords, int radius,"
    " str metric, bool causal, bool see_text, float scale) -> Tensor"
)
neighbor_sums = torch.ops.foveate.neighbor_sums.default
"""As `attention_sums`, of visual queries that look at their neighbours as in `neighbor_attention`.

k: visual and text keys; q_coords int64 [B, n, 3] and coords [B, m_0, 3]: image, row and column of queries and visual
keys; see_text: whether earlier text is seen."""


@fake("neighbor_sums")
def _neighbor_sums(
    q: Tensor,
    k: list[Tensor],
    q_order: Tensor,
    k_order: list[Tensor],
    q_coords: Tensor,
    coords: Tensor,
    radius: int,
    metric: str,
    causal: bool,
    see_text: bool,
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape[0], k[0].shape[1], sum(x.shape[2] for x in k), dtype=torch.float32)


LIBRARY.define("window_tokens(Tensor order, Tensor[] others, int window) -> (Tensor, Tensor)")
window_tokens = torch.ops.foveate.window_tokens.default
"""The tokens of a stream that are among the last `window` of their row, of this and the other streams together.

order int64 [B, n], others: list of [B, m_j] -> index int64 [B, min(window, n)] in their old order, and their order;
slots left over point at token 0 with order `PAD`."""


@fake("window_tokens")
def _window_tokens(order: Tensor, others: list[Tensor], window: int) -> tuple[Tensor, Tensor]:
    size = (order.shape[0], torch.sym_min(window, order.shape[1]))
    return order.new_empty(size), order.new_empty(size)


LIBRARY.define(
    "snapkv_tokens(Tensor scores, Tensor[] orders, float capacity, int window, int kernel, str pooling)"
    " -> (Tensor, Tensor)"
)
snapkv_tokens = torch.ops.foveate.snapkv_tokens.default
"""The keys that stay in each key head (SnapKV, arXiv 2404.14469, section 4).

scores fp32 [B, Hk, n], of all streams one after another, and their orders. The last `window` tokens of a row stay, and
of the earlier ones those with the best scores, pooled along the row (`avg`, in which what is beyond the ends counts as
zero, or `max`) over an odd `kernel` of earlier tokens; ties go to the token that comes first. -> index int64
[B, Hk, C] into the n, in the order of the row, and the places; slots left over point at token 0 with place `PAD`.
C and what a row keeps is `snapkv_count` of its tokens."""


@fake("snapkv_tokens")
def _snapkv_tokens(
    scores: Tensor, orders: list[Tensor], capacity: float, window: int, kernel: int, pooling: str
) -> tuple[Tensor, Tensor]:
    batch, heads, count = scores.shape
    size = (batch, heads, snapkv_count(count, capacity, window))
    return orders[0].new_empty(size), orders[0].new_empty(size)


def snapkv_count(tokens: Any, capacity: float, window: int) -> Any:
    """How many of so many tokens (also a symbolic number) stay; capacity: a number, 1 or more, or a share below 1."""
    if capacity < 1:
        return torch.sym_min(tokens, torch.sym_max(math.floor(capacity * tokens), window))
    return torch.sym_min(tokens, int(capacity))


LIBRARY.define(
    "heavy_tokens(Tensor sums, Tensor[] orders, float heavy, float recent) -> (Tensor, Tensor, Tensor, Tensor)"
)
heavy_tokens = torch.ops.foveate.heavy_tokens.default
"""The keys that stay in each key head (H2O, arXiv 2306.14048, section 4).

sums fp32 [B, Hk, n], of all streams one after another, and their orders. The last `recent` tokens of a row stay, and of
the earlier ones the `heavy` with the largest sums; ties go to the token that comes first. -> index int64 [B, Hk, C]
into the n, in the order of the row, the places and the sums; slots left over point at token 0 with place `PAD`; and
int64 [B, 2], how many heavy and recent tokens a row may hold. C is `heavy_recent_count` of n, at most n."""


@fake("heavy_tokens")
def _heavy_tokens(
    sums: Tensor, orders: list[Tensor], heavy: float, recent: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, count = sums.shape
    size = (batch, heads, torch.sym_min(count, heavy_recent_count(count, heavy, recent)))
    index, places = orders[0].new_empty(size), orders[0].new_empty(size)
    return index, places, sums.new_empty(size), orders[0].new_empty(batch, 2)


def heavy_recent_count(tokens: Any, heavy: float, recent: float) -> Any:
    """How many tokens a cache may hold behind a prompt of so many (also a symbolic number).

    heavy, recent: a number, or a share below 1, of which heavy is rounded down and recent up.
    """
    return (math.floor(heavy * tokens) if heavy < 1 else int(heavy)) + (
        math.ceil(recent * tokens) if recent < 1 else int(recent)
    )


LIBRARY.define("take_keys(Tensor[] x, Tensor index) -> Tensor")
take_keys = torch.ops.foveate.take_keys.default
"""Keys or values of several streams, [B, Hk, m_j, e] each, gathered by head with index int64 [B, Hk, C] into all of
them, one after another -> [B, Hk, C, e]."""


@fake("take_keys")
def _take_keys(x: list[Tensor], index: Tensor) -> Tensor:
    return x[0].new_empty(*index.shape, x[0].shape[3])
