"""Neighbour attention as a local function, which TensorRT may run by a kernel of ours; EXPERIMENTAL.

    NAME(q, k, v, text_k, text_v, images, mask)     ONNX Runtime: attention in standard operators, masked
                                                    TensorRT: a plugin, which needs no mask

The plugin is told which tokens are whose by a table, a row an image, as all of foveate's kernels for GPUs are. The
call's attributes are those of `PluginKernel`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch
from torch import fx

from foveate.backends.onnx.emit import Emitter
from foveate.backends.onnx.sorting import steps
from foveate.ir.program import args_of
from foveate.ir.rewriter import shape
from foveate.kernels.neighbor.plugin import PluginKernel
from foveate.kernels.neighbor.triton_support import METRICS


def kernel_of(emit: Emitter, node: fx.Node) -> PluginKernel | None:
    """The kernel for this neighbour attention; None where the plugin does not take it.

    It does where every image has the same grid, row by row, where nobody has removed tokens before, where the prompt's
    text is a stream of keys, and where there is a kernel.
    """
    q, k, _, q_order, k_order, coords, _, radius, metric, causal, scale = args_of(node)
    height, width = emit.program.info.grid
    whole = emit.program.info.uniform and not emit.program.shortens
    given = all(n.op == "placeholder" for n in (q_order, *k_order, coords))
    if not (whole and given and len(k) == 2 and k_order[0] is q_order and metric in METRICS):
        return None
    kernel = PluginKernel(
        heads=int(shape(q)[1]),
        key_heads=int(shape(k[0])[1]),
        size=int(shape(q)[3]),
        height=height,
        width=width,
        radius=int(radius),
        euclidean=metric == "euclidean",
        causal=bool(causal),
        text=True,
        dtype=str(q.meta["val"].dtype).removeprefix("torch."),
        scale=float(np.float32(scale)),  # as an attribute holds it
    )
    return kernel if kernel.refused() is None else None


def call(emit: Emitter, node: fx.Node, kernel: PluginKernel, mask: str, body: Callable[..., str]) -> str:
    """The call, [B, n, H, e]; body: what it computes, in standard operators, of the seven inputs."""
    q, k, v, q_order, k_order, *_ = args_of(node)
    inputs = [emit.value(x) for x in (q, k[0], v[0], k[1], v[1])]
    table = images(emit, q_order, k_order[1])
    return emit.call(kernel.name, [*inputs, table, mask], body, **asdict(kernel))


def images(emit: Emitter, order: fx.Node, text_order: fx.Node) -> str:
    """int32 [images, 8], as `foveate.kernels.neighbor.tables.image_table` says.

    Every batch row has as many images as its visual tokens begin. One that is padding sees itself and all text: what
    comes of it is finite, and nobody reads it.
    """
    height, width = emit.program.info.grid
    tokens = height * width
    visual, text = emit.value(order), emit.value(text_order)
    begun = emit.op("Add", emit.length(visual, 1), emit.constant([tokens - 1]))
    first = emit.op("Mul", steps(emit, str(emit.op("Div", begun, emit.constant([tokens])))), emit.constant(tokens))
    starts = emit.unsqueeze(str(emit.op("Gather", visual, first, axis=1)), 2)
    # Text that an image sees lies in one piece: padding is in front of it or behind it.
    seen = emit.cast(str(emit.op("LessOrEqual", emit.unsqueeze(text, 1), starts)), torch.int32)
    begin = emit.op("ArgMax", seen, axis=2, keepdims=1, select_last_index=0)
    number = emit.op("ReduceSum", emit.cast(seen, torch.int64), emit.constant([2]), keepdims=1)
    every = emit.op("Shape", begin)

    def column(value: str) -> str:
        return str(emit.op("Expand", value, every))

    rows = emit.unsqueeze(steps(emit, emit.length(visual, 0)), 1, 2)
    columns = [column(rows), column(emit.unsqueeze(str(first), 0, 2))]
    columns += [column(emit.constant(side)) for side in (height, width)]
    columns += [str(begin), str(emit.op("Add", begin, number)), *[column(emit.constant(0))] * 2]
    return emit.cast(emit.reshape(emit.concat(columns, 2), -1, 8), torch.int32)
