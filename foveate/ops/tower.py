"""What methods inside the vision tower choose, merge and hide. `foveate.ops` explains the shapes."""

import torch
from torch import Tensor

from foveate.ops.library import LIBRARY, fake

LIBRARY.define(
    "tome(Tensor keys, Tensor? size, Tensor source, int merge, bool sort) -> (Tensor, Tensor, Tensor, Tensor)"
)
tome = torch.ops.foveate.tome.default
"""Which tokens become one by bipartite soft matching (ToMe, arXiv 2210.09461, section 3).

keys [I, H, n, e] of two tokens or more, the first of them CLS; size fp32 [I, n] (None: all 1), how many patches each
stands for; source int64 [I, n], the place that it stands for; merge: at most (n - 1) // 2. By the cosine of the means
over heads each token at an even place but CLS has a most alike one at an odd place; the `merge` tokens most alike to
theirs join it. -> for `join_tokens` into int64 [I, n] and weight fp32 [I, n], by which every new token is the mean of
its patches; then size and source [I, n - merge] of the new tokens. They stand as in ToMe's code, those left of the even
places before those of the odd ones, or by their source (`sort`)."""


@fake("tome")
def _tome(
    keys: Tensor, size: Tensor | None, source: Tensor, merge: int, sort: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _matched(keys, merge)


LIBRARY.define("join_tokens(Tensor x, Tensor into, Tensor weight, int merged) -> Tensor")
join_tokens = torch.ops.foveate.join_tokens.default
"""Weighted sums of the tokens that become one: x [I, n, C] -> [I, n - merged, C].

Token j, times weight [I, n] (fp32), is added to the new token `into` [I, n] (int64)."""


@fake("join_tokens")
def _join_tokens(x: Tensor, into: Tensor, weight: Tensor, merged: int) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] - merged, x.shape[2])


LIBRARY.define("received(Tensor q, Tensor k, float scale, Tensor? bias=None) -> Tensor")
received = torch.ops.foveate.received.default
"""What each token gets of the others' attention (CrossGET, arXiv 2305.17455, section 3.2): -> fp32 [I, n].

q, k, scale and bias as in `encoder_attention`, of which the last token is the cross token. Its row of the attention
matrix and the mean of all other rows are added, both mean over heads. The matrix is computed in tiles of its rows."""


@fake("received")
def _received(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], dtype=torch.float32)


LIBRARY.define("column_means(Tensor q, Tensor k, float scale) -> Tensor")
column_means = torch.ops.foveate.column_means.default
"""What each token gets of all tokens' attention, the mean over queries and heads: -> fp32 [I, n].

q, k and scale as in `encoder_attention`. What stands for the row of CLS in a tower that has none (VisionZip, arXiv
2412.04467, section 3.2). The matrix is computed in tiles of its rows."""


@fake("column_means")
def _column_means(q: Tensor, k: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], dtype=torch.float32)


LIBRARY.define(
    "crossget(Tensor keys, Tensor importance, Tensor? size, Tensor source, int merge)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
crossget = torch.ops.foveate.crossget.default
"""Which tokens become one by complete-graph soft matching (CrossGET, arXiv 2305.17455, section 3.3).

keys, size and source as in `tome`, of four tokens or more; the first is CLS and the last the cross token, which neither
go nor are joined. importance fp32 [I, n]; merge: at most (n - 2) // 2. Tokens are ranked by their largest cosine to
another one, the largest first, and may match those behind them: the `merge` tokens with the least importance minus
largest cosine to one behind them go, each to the most alike of all that stay. A source s and where it goes, d, are
weighed by 2 softmax(importance_s, importance_d) times their sizes. -> as `tome`, in the old order."""


@fake("crossget")
def _crossget(
    keys: Tensor, importance: Tensor, size: Tensor | None, source: Tensor, merge: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _matched(keys, merge)


LIBRARY.define("cls_curve(Tensor x, float alpha, str alpha_mode) -> (Tensor, Tensor)")
cls_curve = torch.ops.foveate.cls_curve.default
"""How many patches an image keeps, and which, by the curve of their likeness to CLS (arXiv 2409.01162, section 3.1).

x [I, 1 + N, C], CLS first -> places int64 [I, N], those that stay in the order of the image and then the others, and
count int64 [I], how many stay. With d the softmax over patches of CLS * patch / sqrt(C), sorted so that it falls, the
curve turns at the i of 1 to N - 1 with the largest (N - i) (d_1 - d_i), the first of several. The best k patches stay:
ceil((1 + alpha) i) for `expand`, ceil(alpha i) for `literal`, i + ceil(alpha N) for `floor_add`, at least 1, at most
N; all, where all are equally like CLS."""


@fake("cls_curve")
def _cls_curve(x: Tensor, alpha: float, alpha_mode: str) -> tuple[Tensor, Tensor]:
    images, count, _ = x.shape
    return x.new_empty(images, count - 1, dtype=torch.int64), x.new_empty(images, dtype=torch.int64)


LIBRARY.define("padded_keys(Tensor x, Tensor count) -> Tensor")
padded_keys = torch.ops.foveate.padded_keys.default
"""The bias of `encoder_attention` that hides padding: x [I, 1 + n, C], count int64 [I] -> fp32 [I, 1 + n].

0 for CLS and the first `count` tokens behind it, -inf for the others."""


@fake("padded_keys")
def _padded_keys(x: Tensor, count: Tensor) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


def _matched(keys: Tensor, merge: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a matching returns: into, weight, size, source."""
    images, _, count, _ = keys.shape
    into, source = (keys.new_empty(images, n, dtype=torch.int64) for n in (count, count - merge))
    weight, size = (keys.new_empty(images, n, dtype=torch.float32) for n in (count, count - merge))
    return into, weight, size, source
