"""What a program costs, read off its graphs: FLOPs, bytes moved, key/value bytes, and a roofline forecast.

Symbolic shapes make sizes arguments: one trace answers for any number of tokens, on the `meta` device too. One
multiply-add is two FLOPs; attention counts every query times every key of each call (as `torch.utils.flop_counter`
does); ops on single elements count no FLOPs but their bytes; views count nothing.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx

from foveate import ops
from foveate.errors import InputError
from foveate.ir.attention import Attention
from foveate.ir.join import join
from foveate.ir.program import Program, args_of, layer_kv

aten = torch.ops.aten


@dataclass(frozen=True)
class Device:
    """A machine as a roofline sees it: peak rates in FLOP/s and byte/s."""

    name: str
    flops_per_s: float
    bytes_per_s: float


DEVICES = {"cpu": Device("cpu", 1e11, 2e10)}
"""Known devices by name. `cpu` is a nominal two-core machine; `foveate.bench.calibrate` measures the one at hand."""


@dataclass(frozen=True)
class GraphCost:
    """One run of a graph: floating-point operations, bytes read and written, and predicted seconds."""

    flops: int
    bytes: int
    time_s: float


@dataclass(frozen=True)
class Cost:
    """One prompt batch: `vision` and `prefill` once, `decode` a generated token; bytes of cache and at the peak."""

    vision: GraphCost
    prefill: GraphCost
    decode: GraphCost
    kv_bytes: int
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


class Sizes:
    """Values for a program's symbolic sizes."""

    def __init__(self, program: Program, values: Mapping[str, int]) -> None:
        self.values = {symbol: values[name] for symbol, name in program.symbols.names().items() if name in values}
        self.known: dict[Any, int] = {}

    def of(self, size: Any) -> int:
        """A size, symbolic or not, as a number."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if expression not in self.known:
            self.known[expression] = int(expression.subs(self.values))
        return self.known[expression]

    def shape(self, node: fx.Node) -> list[int]:
        """The shape of a node's value in numbers."""
        return [self.of(s) for s in node.meta["val"].shape]

    def numel(self, node: fx.Node) -> int:
        """How many elements a node's value has; 0 for what is no tensor."""
        if not isinstance(node.meta.get("val"), Tensor):
            return 0
        count = 1
        for size in self.shape(node):
            count *= size
        return count

    def nbytes(self, node: fx.Node) -> int:
        """Bytes of a node's value."""
        return self.numel(node) * node.meta["val"].element_size() if self.numel(node) else 0


def cost_of(
    program: Program,
    *,
    visual_tokens: int | None = None,
    text_tokens: int = 60,
    batch: int = 1,
    images: int = 1,
    past_tokens: int | None = None,
    device: Device | str = "cpu",
) -> Cost:
    """The cost of one batch.

    visual_tokens: a row, all its images together (default: `images` whole images). images: a row. past_tokens: text
    tokens in the cache when a token is decoded (default: text_tokens). Raises InputError for sizes below what a
    prompt needs, or an unknown device.
    """
    machine = _device(device)
    visual = images * program.info.tokens_per_image if visual_tokens is None else visual_tokens
    if text_tokens < 1 or batch < 1 or images < 0 or visual < 0 or (past_tokens or 0) < 0:
        raise InputError("sizes must be: text_tokens and batch 1 or more, images, visual_tokens, past_tokens 0 or more")
    base = {"batch": batch, "images": batch * images, "visual_tokens": visual, "prefix": 0}
    first = Sizes(program, {**base, "text_tokens": text_tokens})
    step = Sizes(
        program, {**base, "text_tokens": 1, "past_tokens": text_tokens if past_tokens is None else past_tokens}
    )
    prefill = join(program, program.prefill)
    peaks = [peak_bytes(program.graphs["vision"], first), peak_bytes(prefill, first)]
    return Cost(
        vision=graph_cost(program.graphs["vision"], first, machine),
        prefill=graph_cost(prefill, first, machine),
        decode=graph_cost(program.graphs["decode"], step, machine),
        kv_bytes=kv_bytes(program, first),
        peak_bytes=max(peaks) + sum(w.nbytes for _, w in program.weights.items()),
    )


def prefill_cost(program: Program) -> dict[str, int]:
    """What a pass changes, at one image and 60 text tokens: `prefill_flops` and `kv_bytes`."""
    values = {"batch": 1, "images": 1, "visual_tokens": program.info.tokens_per_image, "text_tokens": 60}
    sizes = Sizes(program, values)
    return {"prefill_flops": graph_flops(program.prefill, sizes), "kv_bytes": kv_bytes(program, sizes)}


def graph_cost(graph: fx.Graph, sizes: Sizes, device: Device) -> GraphCost:
    """Sum over nodes; each takes the longer of its arithmetic and its memory time."""
    total_flops = total_bytes = 0
    time = 0.0
    for node in graph.nodes:
        flops, moved = node_flops(node, sizes), node_bytes(node, sizes)
        total_flops += flops
        total_bytes += moved
        time += max(flops / device.flops_per_s, moved / device.bytes_per_s)
    return GraphCost(total_flops, total_bytes, time)


def graph_flops(graph: fx.Graph, sizes: Sizes) -> int:
    """FLOPs of one run of a graph."""
    return sum(node_flops(node, sizes) for node in graph.nodes)


def node_flops(node: fx.Node, sizes: Sizes) -> int:
    """FLOPs of one node."""
    rule = FLOPS.get(node.target)
    return rule(node, sizes) if rule else 0


def node_bytes(node: fx.Node, sizes: Sizes) -> int:
    """Bytes one node reads and writes; weights count at the size that is read."""
    if node.op != "call_function" or node.target in VIEWS:
        return 0
    return sum(sizes.nbytes(n) for n in {*node.all_input_nodes, node} if isinstance(n.meta.get("val"), Tensor))


def kv_bytes(program: Program, sizes: Sizes) -> int:
    """Bytes of all layers' keys and values after a prefill."""
    return sum(sizes.nbytes(n) for layer in layer_kv(program.prefill) for n in (*layer.text, *(layer.visual or ())))


def peak_bytes(graph: fx.Graph, sizes: Sizes) -> int:
    """Most bytes of values alive at once in a run, each freed after its last use; weights not counted."""
    last = {n: node for node in graph.nodes for n in node.all_input_nodes}
    alive = peak = 0
    for node in graph.nodes:
        if node.op in ("placeholder", "call_function") and node.target not in VIEWS:
            alive += sizes.nbytes(node) if isinstance(node.meta.get("val"), Tensor) else 0
        peak = max(peak, alive)
        for n in node.all_input_nodes:
            if last[n] is node and n.op != "get_attr" and n.target not in VIEWS:
                alive -= sizes.nbytes(n) if isinstance(n.meta.get("val"), Tensor) else 0
    return peak


def _device(device: Device | str) -> Device:
    if isinstance(device, Device):
        return device
    if device not in DEVICES:
        raise InputError(f"device {device!r} is not known; there are: {', '.join(DEVICES)}")
    return DEVICES[device]


def _linear(node: fx.Node, sizes: Sizes) -> int:
    return 2 * sizes.numel(node) * sizes.shape(args_of(node)[1])[1]


def _conv(node: fx.Node, sizes: Sizes) -> int:
    _, *kernel = sizes.shape(args_of(node)[1])
    per_element = 1
    for size in kernel:
        per_element *= size
    return 2 * sizes.numel(node) * per_element


def _matmul(node: fx.Node, sizes: Sizes) -> int:
    return 2 * sizes.numel(node) * sizes.shape(args_of(node)[0])[-1]


def _attention(node: fx.Node, sizes: Sizes) -> int:
    attention = Attention.of(node)
    batch, heads, _, size = sizes.shape(attention.q[0])
    queries, keys = (sum(sizes.shape(x)[2] for x in xs) for xs in (attention.q, attention.k))
    return 4 * batch * heads * size * queries * keys


def _encoder_attention(node: fx.Node, sizes: Sizes) -> int:
    batch, heads, count, size = sizes.shape(args_of(node)[0])
    return 4 * batch * heads * size * count * count


def _row(node: fx.Node, sizes: Sizes) -> int:
    batch, heads, rows, size = sizes.shape(args_of(node)[0])
    return 2 * batch * heads * rows * size * sum(sizes.shape(k)[2] for k in args_of(node)[1])


FLOPS: dict[Any, Callable[[fx.Node, Sizes], int]] = {
    aten.linear.default: _linear,
    aten.conv2d.default: _conv,
    aten.matmul.default: _matmul,
    ops.attention: _attention,
    ops.encoder_attention: _encoder_attention,
    ops.attention_row: _row,
}

VIEWS = {
    aten.slice.Tensor,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
    aten.expand.default,
    aten.select.int,
    aten.sym_size.int,
    operator.getitem,
}
"""Ops that move nothing."""
