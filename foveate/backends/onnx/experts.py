"""Mixtures of experts: a loop over those that some token chose, each of which takes its own rows.

    shares, number = the largest of softmax(logits)       [n, k] each
    for e in unique(number):                              out[rows] += shares * down[e](act(gate[e] rows) * up[e] rows)

So an expert's weights are read only where a token chose it, and each from where it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from foveate import ops
from foveate.backends.onnx.aten import gelu, silu
from foveate.backends.onnx.emit import Emitter, Writer
from foveate.ir.program import args_of
from foveate.ir.rewriter import shape


def _experts(emit: Emitter, node: fx.Node) -> str:
    x, logits, gate_up, down, chosen, activation = args_of(node)
    value: Tensor = x.meta["val"]
    width = int(shape(x)[-1])
    rows = emit.reshape(emit.value(x), -1, width)
    shares, number = _routes(emit, logits, chosen)
    hit = emit.op("Unique", emit.reshape(number, -1), sorted=1)
    start = emit.op("Expand", emit.constant(0, value.dtype), emit.op("Shape", rows))

    def one(turn: str, out: str) -> list[str]:
        expert = emit.op("Gather", hit, turn)
        places = emit.op("Transpose", emit.op("NonZero", emit.op("Equal", number, expert)), perm=[1, 0])
        own = emit.slice(str(places), 1, emit.constant([0]), emit.constant([1]))
        given = emit.op("GatherND", rows, own)
        both = emit.op("Gemm", given, emit.op("Gather", emit.value(gate_up), expert, axis=0), transB=1)
        gate, up = emit.op("Split", both, outputs=2, axis=1, num_outputs=2)
        inner = emit.op("Mul", ACTIVATIONS[activation](emit, gate), up)
        made = emit.op("Gemm", inner, emit.op("Gather", emit.value(down), expert, axis=0), transB=1)
        weighted = emit.op("Mul", made, emit.unsqueeze(emit.op("GatherND", shares, places), 1))
        return [str(emit.op("ScatterND", out, own, emit.op("Add", emit.op("GatherND", out, own), weighted)))]

    (out,) = emit.loop(str(emit.op("Squeeze", emit.op("Shape", hit))), {str(start): value.dtype}, one)
    return str(emit.op("Reshape", out, emit.op("Shape", emit.value(x))))


def _routes(emit: Emitter, logits: Any, chosen: int) -> tuple[str, str]:
    """Each row's chosen experts: their shares in the logits' dtype, and which they are, [n, chosen] both."""
    flat = emit.reshape(emit.value(logits), -1, int(shape(logits)[-1]))
    likely = emit.op("Softmax", emit.cast(flat, torch.float32), axis=-1)
    most, number = emit.op("TopK", likely, emit.constant([chosen]), outputs=2, axis=-1)
    shares = emit.op("Div", most, emit.op("ReduceSum", most, emit.constant([-1]), keepdims=1))
    return emit.cast(str(shares), logits.meta["val"].dtype), str(number)


ACTIVATIONS: dict[str, Callable[[Emitter, str], str]] = {
    "silu": silu,
    "gelu": gelu,
    "gelu_pytorch_tanh": partial(gelu, approximate="tanh"),
}

WRITERS: dict[Any, Writer] = {ops.experts: _experts}
