"""Schemas of the `foveate::` ops and what they return, without saying how they compute it.

Graphs refer to these ops; `foveate.kernels` implements them. Shapes below use B (batch), H and Hk (query and
key heads), n (tokens), e (head size). An *order* tensor int64 [B, n] holds each token's place in its sequence;
a padded token has `PAD`, the largest int64. A query sees a key when the key's order is not larger than its own,
which gives causality and padding in one rule and survives any removal or reordering of tokens.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PAD = torch.iinfo(torch.int64).max
"""Order of a token that is only padding: it comes after everything, so no real query sees it."""

FEW_QUERIES = 8
"""Up to so many queries attention is plain matmuls over all keys."""

BLOCK = 256
"""Longer attention runs in blocks of so many queries, each of which reads the keys up to its last query."""

LIBRARY = torch.library.Library("foveate", "DEF")

LIBRARY.define(
    "attention(Tensor[] q, Tensor[] k, Tensor[] v, Tensor[] q_order, Tensor[] k_order, SymInt prefix,"
    " str layout, float scale) -> Tensor"
)
LIBRARY.define(
    "neighbor_attention(Tensor q, Tensor[] k, Tensor[] v, Tensor q_order, Tensor[] k_order, Tensor coords,"
    " Tensor grids, int radius, str metric, bool causal, float scale) -> Tensor"
)
LIBRARY.define("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor")
LIBRARY.define("encoder_attention(Tensor q, Tensor k, Tensor v, float scale) -> Tensor")
LIBRARY.define("varlen_attention(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, float scale) -> Tensor")
LIBRARY.define("attention_row(Tensor q, Tensor[] k, Tensor q_order, Tensor[] k_order, float scale) -> Tensor")
LIBRARY.define("top_tokens(Tensor scores, Tensor order, float keep, Tensor? whole=None) -> (Tensor, Tensor)")
LIBRARY.define("residual(Tensor x, Tensor y, Tensor rest) -> Tensor")
LIBRARY.define("take_tokens(Tensor x, Tensor index, int dim) -> Tensor")
LIBRARY.define("random_scores(Tensor order, int seed) -> Tensor")
LIBRARY.define("grid_scores(Tensor coords) -> Tensor")
LIBRARY.define("places(Tensor x) -> Tensor")
LIBRARY.define("diverse_scores(Tensor x, float keep) -> Tensor")
LIBRARY.define("distinct_scores(Tensor row, Tensor x, float keep, float important) -> Tensor")
LIBRARY.define("visionzip(Tensor row, Tensor metric, int dominant, int contextual) -> (Tensor, Tensor)")
LIBRARY.define("prumerge(Tensor row, Tensor metric, float? keep, bool plus, int neighbors) -> (Tensor, Tensor, Tensor)")
LIBRARY.define("raters(Tensor visual, Tensor text, Tensor visual_order, Tensor text_order) -> Tensor")
LIBRARY.define(
    "rater_scores(Tensor q, Tensor[] k, Tensor q_order, Tensor[] k_order, Tensor chosen, float scale) -> Tensor"
)
LIBRARY.define(
    "recycle_tokens(Tensor scores, Tensor order, Tensor x, Tensor whole, float keep) -> (Tensor, Tensor, Tensor)"
)
LIBRARY.define("merge_tokens(Tensor x, Tensor weights) -> Tensor")
LIBRARY.define(
    "dart_scores(Tensor keys, Tensor x, Tensor order, Tensor text_keys, Tensor text, Tensor text_order, float keep,"
    " int pivots) -> Tensor"
)
LIBRARY.define(
    "attention_statistics(Tensor[] q, Tensor[] k, Tensor[] out, Tensor[] q_order, Tensor[] k_order, Tensor coords,"
    " int distances, float scale) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.define("activity(Tensor x, Tensor order) -> Tensor")
LIBRARY.define("divergence(Tensor logits, Tensor other) -> Tensor")

attention = torch.ops.foveate.attention.default
"""Causal attention of one or more query streams over one or more key streams.

q: list of [B, H, n_i, e]; k, v: list of [B, Hk, m_j, e], H a multiple of Hk; q_order, k_order: their orders.
Returns [B, sum n_i, H, e]: the query streams one after another.

`layout` names the streams, queries before the colon, keys after it: v visual, t text, s both in one stream. So
"vt:vt" is a whole prefill layer, "t:t" one that is blind, "t:vtt" a decode step (visual cache, text cache, new).
`prefix` is a promise about structure. If it is not negative, nothing is padded, every stream is in sequence
order, and all visual tokens stand together after the first `prefix` text tokens; -1 promises nothing."""

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

linear = torch.ops.foveate.linear.default
"""As `torch.nn.functional.linear`, but compilers leave it to `foveate.kernels.linear`, which knows the processor."""

encoder_attention = torch.ops.foveate.encoder_attention.default
"""Attention without a mask, as vision towers do it: q, k, v [B, H, n, e] -> [B, n, H, e]."""

varlen_attention = torch.ops.foveate.varlen_attention.default
"""Attention of a packed sequence, in which a token sees the tokens of its own segment, before and behind it.

q, k, v [1, H, n, e] -> [1, n, H, e]. cu_seqlens int32 or int64 [segments + 1]: 0, the end of the first segment, and
so on up to n; segments may be empty."""

attention_row = torch.ops.foveate.attention_row.default
"""What a few queries pay to the first key stream: q [B, H, R, e], k list of [B, Hk, m_j, e] -> fp32 [B, H, R, m_0].

The softmax runs over every visible key of every stream."""

top_tokens = torch.ops.foveate.top_tokens.default
"""The best tokens by (score, then lower index), in their old order.

scores fp32 [B, n], order int64 [B, n] -> index int64 [B, floor(keep * n)] and the kept tokens' order. A row with
n_b < n real tokens keeps floor(keep * n_b) of them; the slots left over point at token 0 with order `PAD`.
whole: the order of more tokens, of which these are left; `keep` is then a share of those, and at most all are kept."""

take_tokens = torch.ops.foveate.take_tokens.default
"""x [B, ..., n at dim, ...] gathered along `dim` with index int64 [B, k]; B may be 1 in x."""

residual = torch.ops.foveate.residual.default
"""x + y, both [B, n, D], and what the last tokens get besides, `rest` [B, m, D] with m at most n: -> [B, n, D]."""

random_scores = torch.ops.foveate.random_scores.default
"""Scores in [0, 1) that depend on the seed and each token's place in its stream only: order [B, n] -> fp32 [B, n]."""

grid_scores = torch.ops.foveate.grid_scores.default
"""Scores of which the best k, for any k, lie evenly over the image: coords int64 [B, n, 3] -> fp32 [B, n].

Row and column are read as binary numbers from their low ends: half of the tokens are a checkerboard, a quarter every
second row and column. Exact up to 4096 rows or columns."""

places = torch.ops.foveate.places.default
"""0 to n - 1 in every row: x [B, n, ...] -> int64 [B, n]."""

diverse_scores = torch.ops.foveate.diverse_scores.default
"""Scores of tokens that differ from one another, by DivPrune's max-min rule (arXiv 2503.02175, algorithm 1).

x [I, n, D] -> fp32 [I, n]. In each row ceil(keep * n) tokens are picked: first the one whose nearest other token is
farthest by 1 - cosine, then ever the one that is farthest from its nearest picked one; the lower index in a tie. The
pick number p (from 0) scores 1 - p / n, all others 0."""

distinct_scores = torch.ops.foveate.distinct_scores.default
"""1 for the tokens that VisPruner keeps, 0 for others (arXiv 2412.01818, section 3): row [I, n], x [I, n, C] -> [I, n].

Of T = floor(keep * n) tokens the floor(important * T) with the highest `row` stay. From the others, in the order of
`row`, in each round up to 8 go that are most alike to another one: those at even places of the list are compared with
those at odd ones by cosine; what is left of the even ones, most alike first, then stands before the odd ones."""

visionzip = torch.ops.foveate.visionzip.default
"""Dominant and contextual tokens (VisionZip, arXiv 2412.04467, section 3.2) as weights of all n tokens.

row fp32 [I, n], metric [I, n, e] -> weights fp32 [I, dominant + contextual, n], and the place in 0 to n - 1 that each
new token stands for. The `dominant` tokens with the highest row stand for themselves. Of the rest every s-th is a
target, s = rest // contextual; the others join the target that is most alike by cosine, and the mean of those who
joined is added to it."""

prumerge = torch.ops.foveate.prumerge.default
"""PruMerge's tokens (arXiv 2403.15388, section 3) as weights of all n tokens.

row fp32 [I, n], what the CLS token pays; metric [I, n, e] -> weights fp32 [I, k, n], places int64 [I, k], count [I].
An image keeps the tokens whose row lies above the third quartile by more than 1.5 times the interquartile range
(keep None: then k = n), or floor(keep * n) - 1 = k - 1, by falling row. `plus` adds a uniform sample in the order
of the image: every s-th place but the last, s = n // kept // 3; with a `keep`, half of it. To each the `neighbors` most
alike tokens are added, times their row; behind the kept ones stands the sum of all that go, times their row, if any."""

raters = torch.ops.foveate.raters.default
"""Which text tokens judge visual ones (SparseVLM, arXiv 2410.04417, section 3.2): fp32 [B, m], 1 or 0.

visual [B, n, D] and text [B, m, D] embeddings with their orders. Of the text behind the last image, those tokens whose
mean over visual tokens of softmax over that text of visual times text is above the average."""

rater_scores = torch.ops.foveate.rater_scores.default
"""What chosen queries pay to the first key stream, mean over them and over heads: -> fp32 [B, m_0].

q, k and orders as in `attention_row`; chosen fp32 [B, R], 1 or 0. Zero in a row where none is chosen."""

recycle_tokens = torch.ops.foveate.recycle_tokens.default
"""The best tokens, and some of the others as clusters (SparseVLM, arXiv 2410.04417, section 3.4).

scores fp32 [B, n], order int64 [B, n], x [B, n, D]; whole: the order of all tokens that `keep` is a share of. Of a
row's n_b tokens floor(keep * whole) stay; of the g that go, the 3 g // 10 + 1 best become C = (3 g // 10 + 1) // 10 + 1
clusters around density peaks. -> index int64 [B, k] of those that stay and of the peaks, in their old order, their
order, and weights fp32 [B, k, n]: a token that stays is itself, a peak the mean of its cluster."""

merge_tokens = torch.ops.foveate.merge_tokens.default
"""Weighted sums of tokens: x [B, n, D], weights [B, k, n] -> [B, k, D]."""

dart_scores = torch.ops.foveate.dart_scores.default
"""Scores of tokens that are least alike to a few pivots (DART, arXiv 2502.11494, section 3), the first pick highest.

keys [B, Hk, n, e], x [B, n, D] and order of visual tokens, the same of text tokens -> fp32 [B, n]. Pivots are the
`pivots` tokens with the largest keys by the sum of absolute values, of the image and of the text behind it. Of a row's
n_b visual tokens floor(keep * n_b) are picked: the visual pivots, then for each pivot an equal part of the rest, those
left with the lowest cosine to it. All others score 0."""

attention_statistics = torch.ops.foveate.attention_statistics.default
"""What one layer's attention looks at, for calibration; q, k, out and orders are lists of a visual and a text stream.

q: [B, H, n, e] each, k: [B, Hk, m, e] each, out: what attention gave the queries, [B, n, H, e] each. coords int64
[B, m of the visual keys, 3]: image, row and column; visual queries and keys are the same tokens. Padding counts
nowhere. Returns, all fp32,

- mass [B, H, 2, 3]: softmaxed attention from visual and from text queries (summed over them) to text keys before the
  row's first visual token, visual keys, and later text keys (summed over them);
- norms [B, H, 2]: mean over visual and over text queries of the norm of a head's output (0 where there is none);
- by_distance [B, H, distances]: attention from visual queries to visual keys of the same image, summed by their
  Euclidean distance on the grid, rounded; the last entry holds everything from there on;
- pairs [B, distances]: how many pairs of a query and a key that it sees are that far apart."""

activity = torch.ops.foveate.activity.default
"""Mean absolute value over tokens that are not padding: x [B, n, m], order [B, n] -> fp32 [B, m], 0 without tokens."""

divergence = torch.ops.foveate.divergence.default
"""KL(p || q) in nats of the distributions that logits [B, 1, V] and other logits [B, 1, V] stand for -> fp32 [B]."""


@torch.library.register_fake("foveate::attention", lib=LIBRARY)
def _attention(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_order: list[Tensor],
    k_order: list[Tensor],
    prefix: int,
    layout: str,
    scale: float,
) -> Tensor:
    batch, heads, _, size = q[0].shape
    tokens = sum(x.shape[2] for x in q)
    return q[0].new_empty(batch, tokens, heads, size)


@torch.library.register_fake("foveate::neighbor_attention", lib=LIBRARY)
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


@torch.library.register_fake("foveate::linear", lib=LIBRARY)
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("foveate::encoder_attention", lib=LIBRARY)
def _encoder_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


@torch.library.register_fake("foveate::varlen_attention", lib=LIBRARY)
def _varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


@torch.library.register_fake("foveate::attention_row", lib=LIBRARY)
def _attention_row(q: Tensor, k: list[Tensor], q_order: Tensor, k_order: list[Tensor], scale: float) -> Tensor:
    return q.new_empty(*q.shape[:3], k[0].shape[2], dtype=torch.float32)


@torch.library.register_fake("foveate::top_tokens", lib=LIBRARY)
def _top_tokens(scores: Tensor, order: Tensor, keep: float, whole: Tensor | None = None) -> tuple[Tensor, Tensor]:
    kept = math.floor(keep * (scores if whole is None else whole).shape[1])
    return order.new_empty(order.shape[0], kept), order.new_empty(order.shape[0], kept)


@torch.library.register_fake("foveate::take_tokens", lib=LIBRARY)
def _take_tokens(x: Tensor, index: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[0], shape[dim] = index.shape[0], index.shape[1]
    return x.new_empty(shape)


@torch.library.register_fake("foveate::residual", lib=LIBRARY)
def _residual(x: Tensor, y: Tensor, rest: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("foveate::random_scores", lib=LIBRARY)
def _random_scores(order: Tensor, seed: int) -> Tensor:
    return order.new_empty(order.shape, dtype=torch.float32)


@torch.library.register_fake("foveate::grid_scores", lib=LIBRARY)
def _grid_scores(coords: Tensor) -> Tensor:
    return coords.new_empty(coords.shape[:2], dtype=torch.float32)


@torch.library.register_fake("foveate::places", lib=LIBRARY)
def _places(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.int64)


@torch.library.register_fake("foveate::diverse_scores", lib=LIBRARY)
def _diverse_scores(x: Tensor, keep: float) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.register_fake("foveate::distinct_scores", lib=LIBRARY)
def _distinct_scores(row: Tensor, x: Tensor, keep: float, important: float) -> Tensor:
    return torch.empty_like(row)


@torch.library.register_fake("foveate::visionzip", lib=LIBRARY)
def _visionzip(row: Tensor, metric: Tensor, dominant: int, contextual: int) -> tuple[Tensor, Tensor]:
    images, count = row.shape
    width = dominant + contextual
    return row.new_empty(images, width, count), row.new_empty(images, width, dtype=torch.int64)


@torch.library.register_fake("foveate::prumerge", lib=LIBRARY)
def _prumerge(
    row: Tensor, metric: Tensor, keep: float | None, plus: bool, neighbors: int
) -> tuple[Tensor, Tensor, Tensor]:
    images, count = row.shape
    width = count if keep is None else math.floor(keep * count)
    places = row.new_empty(images, width, dtype=torch.int64)
    return row.new_empty(images, width, count), places, places.new_empty(images)


@torch.library.register_fake("foveate::raters", lib=LIBRARY)
def _raters(visual: Tensor, text: Tensor, visual_order: Tensor, text_order: Tensor) -> Tensor:
    return text.new_empty(text_order.shape, dtype=torch.float32)


@torch.library.register_fake("foveate::rater_scores", lib=LIBRARY)
def _rater_scores(
    q: Tensor, k: list[Tensor], q_order: Tensor, k_order: list[Tensor], chosen: Tensor, scale: float
) -> Tensor:
    return q.new_empty(q.shape[0], k[0].shape[2], dtype=torch.float32)


@torch.library.register_fake("foveate::recycle_tokens", lib=LIBRARY)
def _recycle_tokens(
    scores: Tensor, order: Tensor, x: Tensor, whole: Tensor, keep: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, count = order.shape
    stay = math.floor(keep * whole.shape[1])
    width = stay + cluster_count(count - stay)
    index = order.new_empty(batch, width)
    return index, torch.empty_like(index), scores.new_empty(batch, width, count)


@torch.library.register_fake("foveate::merge_tokens", lib=LIBRARY)
def _merge_tokens(x: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[1], x.shape[2])


@torch.library.register_fake("foveate::dart_scores", lib=LIBRARY)
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


@torch.library.register_fake("foveate::attention_statistics", lib=LIBRARY)
def _attention_statistics(
    q: list[Tensor],
    k: list[Tensor],
    out: list[Tensor],
    q_order: list[Tensor],
    k_order: list[Tensor],
    coords: Tensor,
    distances: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads = q[0].shape[:2]
    sizes = ((batch, heads, 2, 3), (batch, heads, 2), (batch, heads, distances), (batch, distances))
    mass, norms, by_distance, pairs = (q[0].new_empty(size, dtype=torch.float32) for size in sizes)
    return mass, norms, by_distance, pairs


@torch.library.register_fake("foveate::activity", lib=LIBRARY)
def _activity(x: Tensor, order: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)


@torch.library.register_fake("foveate::divergence", lib=LIBRARY)
def _divergence(logits: Tensor, other: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def cluster_count(gone: Any) -> Any:
    """Clusters that `recycle_tokens` makes of so many tokens that go (also a symbolic number); none of none."""
    return torch.sym_min((gone * 3 // 10 + 1) // 10 + 1, gone)


ROUND = 8
"""Tokens that go in one round of `distinct_scores`."""


def distinct_pairs(count: int, keep: float, important: float) -> int:
    """Pairs of tokens that `distinct_scores` compares in all its rounds, for an image of so many tokens."""
    total = math.floor(keep * count)
    wanted = total - math.floor(important * total)
    rest, pairs = count - (total - wanted), 0
    while rest > wanted > 0:
        even = (rest + 1) // 2
        pairs += even * (rest - even)
        rest -= min(ROUND, rest - wanted, even)
    return pairs


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
        parts = _lower_right_pairs(n - before, m), _lower_right_pairs(before, prefix)
        return parts[0][0] + parts[1][0], parts[0][1] + parts[1][1]
    return n * m, n * m


def _lower_right_pairs(n: int, m: int) -> tuple[int, int]:
    """Of the last n of m positions, causal: one square call, or blocks that read what their last query sees."""
    if n == m:
        return n * n, n * (n + 1) // 2
    spanned = sum((min(i + BLOCK, n) - i) * (m - n + min(i + BLOCK, n)) for i in range(0, n, BLOCK))
    return spanned, spanned
