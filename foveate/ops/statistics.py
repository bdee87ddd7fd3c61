"""What calibration observes. `foveate.ops` explains the shapes."""

import torch
from torch import Tensor

from foveate.ops.library import LIBRARY, fake

LIBRARY.define(
    "attention_statistics(Tensor[] q, Tensor[] k, Tensor[] out, Tensor[] q_order, Tensor[] k_order, Tensor coords,"
    " int distances, float scale) -> (Tensor, Tensor, Tensor, Tensor)"
)
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


@fake("attention_statistics")
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


LIBRARY.define("activity(Tensor x, Tensor order) -> Tensor")
activity = torch.ops.foveate.activity.default
"""Mean absolute value over tokens that are not padding: x [B, n, m], order [B, n] -> fp32 [B, m], 0 without tokens."""


@fake("activity")
def _activity(x: Tensor, order: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)


LIBRARY.define("divergence(Tensor logits, Tensor other) -> Tensor")
divergence = torch.ops.foveate.divergence.default
"""KL(p || q) in nats of the distributions that logits [B, 1, V] and other logits [B, 1, V] stand for -> fp32 [B]."""


@fake("divergence")
def _divergence(logits: Tensor, other: Tensor) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=torch.float32)
