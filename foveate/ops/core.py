"""What decoder layers and vision towers compute. `foveate.ops` explains the shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.ops.library import BLOCK, FEW_QUERIES, LIBRARY, fake

LIBRARY.define(
    "attention(Tensor[] q, Tensor[] k, Tensor[] v, Tensor[] q_order, Tensor[] k_order, SymInt prefix,"
    " str layout, float scale, Tensor[]? reach=None, int window=0) -> Tensor"
)
attention = torch.ops.foveate.attention.default
"""Causal attention of one or more query streams over one or more key streams.

q: list of [B, H, n_i, e]; k, v: list of [B, Hk, m_j, e], H a multiple of Hk; q_order, k_order: their orders.
Returns [B, sum n_i, H, e]: the query streams one after another.

`layout` names the streams, queries before the colon, keys after it: v visual, t text, s both in one stream. So
"vt:vt" is a whole prefill layer, "t:t" one that is blind, "t:vtt" a decode step (visual cache, text cache, new).
`prefix` is a promise about structure. If it is not negative, nothing is padded, every stream is in sequence
order, and all visual tokens stand together after the first `prefix` text tokens; -1 promises nothing.

A query sees the keys whose order is not larger than its own, or, where `reach` is given, than that: int64 [B, n_i] a
query stream, such as the order of its image's last token, so that an image's tokens see each other. With a `window`
above 0 it sees none whose order is smaller than its own by `window` or more."""


@fake("attention")
def _attention(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_order: list[Tensor],
    k_order: list[Tensor],
    prefix: int,
    layout: str,
    scale: float,
    reach: list[Tensor] | None = None,
    window: int = 0,
) -> Tensor:
    batch, heads, _, size = q[0].shape
    tokens = sum(x.shape[2] for x in q)
    return q[0].new_empty(batch, tokens, heads, size)


LIBRARY.define(
    "neighbor_attention(Tensor q, Tensor[] k, Tensor[] v, Tensor q_order, Tensor[] k_order, Tensor coords,"
    " Tensor grids, int radius, str metric, bool causal, float scale) -> Tensor"
)
neighbor_attention = torch.ops.foveate.neighbor_attention.default
"""Attention of visual tokens on their neighbours in the image, and on the text before them (YOPO, section 3.2).

q [B, H, n, e], q_order [B, n]; k, v, k_order: the visual keys [B, Hk, n, e], of the same n tokens, and, where text is
to be seen, the text keys [B, Hk, m, e]. coords int64 [B, n, 3]: image, row and column of each visual token.
Returns [B, n, H, e].

A query sees a text key whose order is not larger than its own, and a visual key (not padding) of the same image whose
distance is at most `radius` and, if `causal`, whose order is not larger than its own. `metric` of the distance:
`chebyshev` max(|rows|, |columns|), `euclidean` sqrt(rows^2 + columns^2), `raster` |difference of orders|.
A padded query gives finite values that mean nothing.

`grids` is a promise about structure, int64 [images, 6] on the CPU, a row an image: batch row, first visual token,
height, width, first text key that it sees, end of those. It holds when the largest sum of height * width over the
images of one batch row is n: then each image's tokens stand together in raster order, the images of a row stand one
behind the other from token 0 on, tokens behind them are padding, and the text keys seen are those, no others.
Otherwise (no image, or tokens were removed since) it promises nothing."""


@fake("neighbor_attention")
def _neighbor_attention(
    q: Tensor,
    k: list[Tensor],
    v: list[Tensor],
    q_order: Tensor,
    k_order: list[Tensor],
    coords: Tensor,
    grids: Tensor,
    radius: int,
    metric: str,
    causal: bool,
    scale: float,
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")
linear = torch.ops.foveate.linear.default
"""As `torch.nn.functional.linear`, but compilers leave it to `foveate.kernels.linear`, which knows the processor."""


@fake("linear")
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


LIBRARY.define("encoder_attention(Tensor q, Tensor k, Tensor v, float scale, Tensor? bias=None) -> Tensor")
encoder_attention = torch.ops.foveate.encoder_attention.default
"""Attention of all tokens on all, as vision towers do it: q, k, v [B, H, n, e] -> [B, n, H, e].

bias: fp32 [B, n], added to every logit of a key: the log of how many tokens it stands for, or -inf for padding. It is
a constant: no gradient flows to it."""


@fake("encoder_attention")
def _encoder_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


LIBRARY.define("varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale) -> Tensor")
varlen_attention = torch.ops.foveate.varlen_attention.default
"""Attention of a packed sequence, in which a token sees the tokens of its own segment, before and behind it.

q, k, v [1, H, n, e] -> [1, n, H, e]. cu_seqlens int32 or int64 [segments + 1]: 0, the end of the first segment, and
so on up to n; segments may be empty."""


@fake("varlen_attention")
def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


LIBRARY.define("residual(Tensor x, Tensor y, Tensor rest) -> Tensor")
residual = torch.ops.foveate.residual.default
"""x + y, both [B, n, D], and what the last tokens get besides, `rest` [B, m, D] with m at most n: -> [B, n, D]."""


@fake("residual")
def _residual(x: Tensor, y: Tensor, rest: Tensor) -> Tensor:
    return torch.empty_like(x)


def attention_pairs(queries: Sequence[int], keys: Sequence[int], layout: str, prefix: int) -> tuple[int, int]:
    """Query-key pairs of one head of a `foveate::attention` call: those its matmuls span, and those it computes.

    queries, keys: tokens of each stream. A causal call spans the whole square and computes half of it.
    """
    n, m = sum(queries), sum(keys)
    if n <= FEW_QUERIES or prefix < 0:
        return n * m, n * m
    if layout == "vt:vt":
        return n * m, n * (n + 1) // 2
    if layout == "t:t":
        return _lower_right_pairs(n, m)
    if layout == "v:vt":
        return _lower_right_pairs(n, prefix + n)
    if layout == "t:vt":
        before = max(0, prefix - (keys[1] - n))
        if before <= FEW_QUERIES:
            return _lower_right_pairs(n, m)
        parts = _lower_right_pairs(n - before, m), _lower_right_pairs(before, prefix)
        return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]
    return n * m, n * m


def _lower_right_pairs(n: int, m: int) -> tuple[int, int]:
    """Of the last n of m positions, causal: one square call, or blocks that read what their last query sees."""
    if n == m:
        return n * n, n * (n + 1) // 2
    spanned = sum((min(i + BLOCK, n) - i) * (m - n + min(i + BLOCK, n)) for i in range(0, n, BLOCK))
    return spanned, spanned
