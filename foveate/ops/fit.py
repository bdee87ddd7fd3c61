"""What visual tokens receive from all who look at them. `foveate.ops` explains the shapes."""

import torch
from torch import Tensor

from foveate.ops.library import LIBRARY, fake

LIBRARY.define(
    "received_attention(Tensor q, Tensor[] k, Tensor q_order, Tensor[] k_order, bool behind, float scale,"
    ' Tensor? coords=None, int radius=0, str metric="chebyshev", bool causal=False) -> Tensor'
)
received_attention = torch.ops.foveate.received_attention.default
"""What the keys of the first stream receive from a query on average: fp32 [B, m_0] (FitPrune, arXiv 2409.10197).

q, k and orders as in `attention_row`, any number of queries. Of each query's weights the largest over heads counts; the
mean is over a row's queries that are no padding, with `behind` over those behind the last key of the first stream (zero
where there are none). With coords int64 [B, R, 3], where queries and first keys are the same tokens, a query sees what
it sees in `neighbor_attention`."""


@fake("received_attention")
def _received_attention(
    q: Tensor,
    k: list[Tensor],
    q_order: Tensor,
    k_order: list[Tensor],
    behind: bool,
    scale: float,
    coords: Tensor | None = None,
    radius: int = 0,
    metric: str = "chebyshev",
    causal: bool = False,
) -> Tensor:
    return q.new_empty(q.shape[0], k[0].shape[2], dtype=torch.float32)
