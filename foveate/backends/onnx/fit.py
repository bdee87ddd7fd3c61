"""What visual tokens receive from all who look at them: every weight at once, where eager takes blocks of queries."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from foveate import ops
from foveate.backends.onnx.attention import around, visible
from foveate.backends.onnx.emit import Emitter, Writer
from foveate.backends.onnx.scoring import softmaxed
from foveate.backends.onnx.sorting import counted, widened
from foveate.ir.program import args_of


def behind_images(emit: Emitter, visual_order: str, text_order: str) -> str:
    """The text tokens behind a row's last visual token: bool [B, m]; none in a row without an image."""
    pad, none = emit.constant(ops.PAD), emit.constant(-1)
    places = widened(emit, str(emit.op("Where", emit.op("Equal", visual_order, pad), none, visual_order)), 2, 1, -1)
    last = emit.op("ReduceMax", places, emit.constant([1]), keepdims=1)
    behind = emit.op("And", emit.op("Greater", text_order, last), emit.op("Greater", last, none))
    return str(emit.op("And", behind, real(emit, text_order)))


def real(emit: Emitter, order: str) -> str:
    """Which tokens are no padding."""
    return str(emit.op("Not", emit.op("Equal", order, emit.constant(ops.PAD))))


def share(emit: Emitter, chosen: str) -> str:
    """What each chosen token weighs in a mean over them: bool [B, n] -> fp32 [B, n]."""
    count = emit.op("Max", counted(emit, chosen), emit.constant([1]))
    return str(emit.op("Div", emit.cast(chosen, torch.float32), emit.cast(count, torch.float32)))


def _received_attention(emit: Emitter, node: fx.Node) -> str:
    q, k, q_order, k_order, behind, scale, *near = args_of(node)
    asked = emit.value(q_order)
    chosen = behind_images(emit, emit.value(k_order[0]), asked) if behind else real(emit, asked)
    if near and near[0] is not None:
        rest: list[Any] = [0, "chebyshev", False]
        coords, radius, metric, causal = [*near, *rest[len(near) - 1 :]]
        seen = around(emit, (q_order, coords), (k_order, coords), radius, metric, causal)
    else:
        seen = visible(emit, [q_order], k_order)
    rows = softmaxed(emit, q, k, seen, scale)
    rows = emit.slice(rows, 3, emit.constant([0]), emit.length(emit.value(k[0]), 2))
    most = emit.op("ReduceMax", rows, emit.constant([1]), keepdims=0)
    # A padded query may see nothing, and its row be no number.
    most = emit.op("Where", emit.unsqueeze(chosen, 2), most, emit.constant(0.0))
    weighted = emit.op("Mul", most, emit.unsqueeze(share(emit, chosen), 2))
    return str(emit.op("ReduceSum", weighted, emit.constant([1]), keepdims=0))


WRITERS: dict[Any, Writer] = {ops.received_attention: _received_attention}
