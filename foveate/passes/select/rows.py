"""Rows of attention as scores, without any other row."""

from __future__ import annotations

import torch
from torch import fx

from foveate import ops
from foveate.ir.attention import Attention
from foveate.ir.program import NodeInfo
from foveate.ir.rewriter import Rewriter
from foveate.ir.tail import END

aten = torch.ops.aten


def last_row(edit: Rewriter, attention: fx.Node, about: NodeInfo) -> fx.Node:
    """What the last text token pays to each visual token, summed over heads: fp32 [B, n].

    attention: a `foveate::attention` node of the text stream whose first keys are visual. The sum ranks as the mean
    over all heads does; heads that do not see the image add nothing. PassError where that layer sees a window only.
    """
    seen = Attention.of(attention).without_window(edit.by, attention)
    last = about.with_(stream="text")
    query = edit.call(aten.slice.Tensor, seen.q[0], 2, -1, END, about=last)
    order = edit.call(aten.slice.Tensor, seen.q_order[0], 1, -1, END, about=last)
    row = edit.call(ops.attention_row, query, seen.k, order, seen.k_order, seen.scale, about=about)
    return edit.call(aten.sum.dim_IntList, row, [1, 2], about=about)
