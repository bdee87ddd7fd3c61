"""What one node does: floating-point operations, and the bytes it moves by what they are.

One multiply-add is two FLOPs. Attention counts the query-key pairs that its calls span (see
`foveate.ops.attention_pairs`), as `torch.utils.flop_counter` does; ops on single elements count no FLOPs but
their bytes; views count nothing.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from foveate import ops
from foveate.ir.attention import Attention
from foveate.ir.cost.devices import Device
from foveate.ir.cost.neighbors import neighbor_flops
from foveate.ir.cost.sizes import Precision, Sizes
from foveate.ir.program import args_of, info, outputs
from foveate.ir.tokens import ELEMENTWISE

aten = torch.ops.aten

VIEWS = {
    aten.slice.Tensor,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
    aten.expand.default,
    aten.select.int,
    aten.sym_size.int,
    aten.detach.default,
    operator.getitem,
}
"""Ops that move nothing."""

GATHERS = {ops.take_tokens, aten.embedding.default}
"""Ops that read only as much of their source as they return."""

ATTENTIONS = {
    *(ops.attention, ops.neighbor_attention, ops.encoder_attention, ops.varlen_attention, ops.cross_attention),
    ops.attention_with_sums,
}

FUSABLE = {
    *ELEMENTWISE,
    *(aten.add.Scalar, aten.mul.Scalar, aten.mean.dim, aten.sum.dim_IntList, aten.softmax.int),
    *(aten.layer_norm.default, aten.rms_norm.default, ops.residual),
}
"""Ops whose chains a compiler makes into one kernel: between two of them nothing is written or read."""


@dataclass(frozen=True)
class Work:
    """What is done: FLOPs, bytes by kind (`written` is the part of `activation_bytes` that is stored), seconds.

    compute_s and memory_s are the parts of time_s in which arithmetic, or memory, is what the machine waits for; the
    rest is what every op takes besides.
    """

    flops: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    kv_bytes: int = 0
    written: int = 0
    time_s: float = 0
    compute_s: float = 0
    memory_s: float = 0

    @property
    def bytes(self) -> int:
        """All bytes moved."""
        return self.weight_bytes + self.activation_bytes + self.kv_bytes

    @property
    def bound(self) -> str:
        """What most of the time goes to: `compute`, `memory`, or `overhead` (of its ops); empty for no time."""
        overhead = self.time_s - self.compute_s - self.memory_s
        parts = {"compute": self.compute_s, "memory": self.memory_s, "overhead": overhead}
        return max(parts, key=lambda name: parts[name]) if self.time_s else ""

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        kinds = {name: getattr(self, name) for name in ("weight_bytes", "activation_bytes", "kv_bytes")}
        stored = {"stored_activation_bytes": self.written, "bound": self.bound}
        return {"flops": self.flops, "bytes": self.bytes, "time_s": self.time_s, **kinds, **stored}

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f) + getattr(other, f) for f in self.__dataclass_fields__))

    def share(self, part: float) -> Work:
        """That share of it, counts rounded to whole numbers."""
        whole = (f for f in ("flops", "weight_bytes", "activation_bytes", "kv_bytes", "written"))
        times = {f: getattr(self, f) * part for f in ("time_s", "compute_s", "memory_s")}
        return Work(**{f: round(getattr(self, f) * part) for f in whole}, **times)


class Meter:
    """Measures the nodes of one graph at given sizes, in given number formats, on a device."""

    def __init__(self, graph: fx.Graph, sizes: Sizes, precision: Precision, device: Device) -> None:
        self.sizes, self.precision, self.device = sizes, precision, device
        kv = outputs(graph).get("kv", [])
        self.kv = {base_of(n) for entry in kv for n in entry if n is not None}
        self.kv |= {n for n in graph.nodes if n.op == "placeholder" and info(n).role == "kv"}

    def kind(self, node: fx.Node) -> str:
        """What a value is: `weight`, `kv` or `activation`."""
        base = base_of(node)
        return "weight" if base.op == "get_attr" else "kv" if base in self.kv else "activation"

    def nbytes(self, node: fx.Node) -> int:
        """Bytes of a value; of a view, as much as it shows, and never more than there is."""
        count, base = self.sizes.numel(node), base_of(node)
        if not count:
            return 0
        count = min(count, self.sizes.numel(base)) if isinstance(base.meta.get("val"), Tensor) else count
        return count * self.precision.bits_of(node.meta["val"], self.kind(node)) // 8

    def of(self, node: fx.Node) -> Work:
        """The work of one node."""
        if node.op != "call_function" or node.target in VIEWS:
            return Work()
        flops, computed = node_flops(node, self.sizes, self.device)
        moved = {"weight": 0, "activation": 0, "kv": 0}
        out = self._written(node)
        moved[self.kind(node)] += out
        for source in dict.fromkeys(node.all_input_nodes):
            if self._is_read(source, node):
                part = node.target in GATHERS and source is args_of(node)[0]
                read = self.nbytes(source) * self._share_of(source, node)
                moved[self.kind(source)] += min(self.nbytes(source), out) if part else round(read)
        return self._timed(node, flops, computed, moved, out)

    def _written(self, node: fx.Node) -> int:
        """Bytes of a node's results that are stored: none where a fused kernel alone reads them."""
        results = [u for u in node.users if u.target is operator.getitem]
        if results:
            return sum(self.nbytes(n) for n in results)
        stays = self.device.fused and node.target in FUSABLE and node not in self.kv
        return 0 if stays and all(u.target in FUSABLE for u in readers(node)) else self.nbytes(node)

    def _is_read(self, source: fx.Node, reader: fx.Node) -> bool:
        if not isinstance(source.meta.get("val"), Tensor):
            return False
        return not (self.device.fused and reader.target in FUSABLE and base_of(source).target in FUSABLE)

    def _share_of(self, source: fx.Node, reader: fx.Node) -> float:
        """The part of a value that is read: of experts, those that some token chooses, if all are as likely."""
        if reader.target != ops.experts or source not in args_of(reader)[2:4]:
            return 1.0
        x, _, _, _, chosen, _ = args_of(reader)
        tokens = self.sizes.numel(x) // self.sizes.shape(x)[-1]
        return float(1 - (1 - chosen / self.sizes.shape(source)[0]) ** tokens)

    def _timed(self, node: fx.Node, flops: int, computed: int, moved: dict[str, int], written: int) -> Work:
        rate = self.device.rate(self.precision.dtype)
        if node.target in ATTENTIONS:
            rate *= self.device.attention
        compute, memory = computed / rate, sum(moved.values()) / self.device.bytes_per_s
        overhead = self.device.op_s if sum(moved.values()) else 0.0
        return Work(
            flops,
            moved["weight"],
            moved["activation"],
            moved["kv"],
            written if self.kind(node) == "activation" else 0,
            max(compute, memory) + overhead,
            compute if compute >= memory else 0.0,
            memory if memory > compute else 0.0,
        )


def base_of(node: fx.Node) -> fx.Node:
    """The value that a view, or a view of a view, looks at."""
    while node.op == "call_function" and node.target in VIEWS:
        source = args_of(node)[0]
        assert isinstance(source, fx.Node)  # the first argument of every view
        node = source
    return node


def readers(node: fx.Node) -> list[fx.Node]:
    """Nodes that read a value, through views too; the output counts as one."""
    found: list[fx.Node] = []
    for user in node.users:
        found += readers(user) if user.target in VIEWS else [user]
    return found


def node_flops(node: fx.Node, sizes: Sizes, device: Device) -> tuple[int, int]:
    """FLOPs of one node as they are counted, and as they are computed (a causal call leaves half of its square out)."""
    if node.target == ops.attention:
        return _attention(node, sizes)
    if node.target == ops.neighbor_attention:
        count = neighbor_flops(node, sizes, device.kind)
        return count, count
    rule = FLOPS.get(node.target)
    count = rule(node, sizes) if rule else 0
    return count, count


def _linear(node: fx.Node, sizes: Sizes) -> int:
    return 2 * sizes.numel(node) * sizes.shape(args_of(node)[1])[1]


def _experts(node: fx.Node, sizes: Sizes) -> int:
    x, _, _, down, chosen, _ = args_of(node)
    return 6 * sizes.numel(x) * int(chosen) * sizes.shape(down)[2]


def _conv(node: fx.Node, sizes: Sizes) -> int:
    return 2 * sizes.numel(node) * math.prod(sizes.shape(args_of(node)[1])[1:])


def _matmul(node: fx.Node, sizes: Sizes) -> int:
    return 2 * sizes.numel(node) * sizes.shape(args_of(node)[0])[-1]


def _attention(node: fx.Node, sizes: Sizes) -> tuple[int, int]:
    attention = Attention.of(node)
    batch, heads, _, size = sizes.shape(attention.q[0])
    queries, keys = ([sizes.shape(x)[2] for x in xs] for xs in (attention.q, attention.k))
    prefix = _prefix(attention, sizes) if attention.plain else -1
    spanned, computed = ops.attention_pairs(queries, keys, attention.layout, prefix)
    return 4 * batch * heads * size * spanned, 4 * batch * heads * size * computed


def _attention_with_sums(node: fx.Node, sizes: Sizes) -> int:
    attention = Attention.of(node)
    batch, heads, _, size = sizes.shape(attention.q[0])
    queries, keys = (sum(sizes.shape(x)[2] for x in xs) for xs in (attention.q, attention.k))
    return 4 * batch * heads * size * ops.summed_pairs(queries, keys, _prefix(attention, sizes))


def _prefix(attention: Attention, sizes: Sizes) -> int:
    return int(sizes.names.get("prefix", -1) if isinstance(attention.prefix, fx.Node) else attention.prefix)


def _encoder_attention(node: fx.Node, sizes: Sizes) -> int:
    batch, heads, count, size = sizes.shape(args_of(node)[0])
    return 4 * batch * heads * size * count * count


def _varlen_attention(node: fx.Node, sizes: Sizes) -> int:
    """Segments of equal length."""
    batch, heads, count, size = sizes.shape(args_of(node)[0])
    segments = max(1, sizes.shape(args_of(node)[3])[0] - 1)
    return 4 * batch * heads * size * count * count // segments


def _segment_means(node: fx.Node, sizes: Sizes) -> int:
    batch, heads, count, size = sizes.shape(args_of(node)[0])
    segments = max(1, sizes.shape(args_of(node)[2])[0] - 1)
    return 2 * batch * heads * size * count * count // segments


def _segment_tokens(node: fx.Node, sizes: Sizes) -> int:
    """Segments of equal length."""
    by, x, _, bounds, _, keep, share = args_of(node)
    count, width = sizes.shape(x)
    segments = max(1, sizes.shape(bounds)[0] - 1)
    return segments * ops.segment_flops(by, count // segments, width, keep, share)


def _row(node: fx.Node, sizes: Sizes) -> int:
    batch, heads, rows, size = sizes.shape(args_of(node)[0])
    return 2 * batch * heads * rows * size * sum(sizes.shape(k)[2] for k in args_of(node)[1])


def _diverse(node: fx.Node, sizes: Sizes) -> int:
    """All pairs of an image's tokens once, then each pick with all of them."""
    images, count, width = sizes.shape(args_of(node)[0])
    return images * ops.segment_flops("diverse", count, width, float(args_of(node)[1]), 0.0)


def _distinct(node: fx.Node, sizes: Sizes) -> int:
    _, x, keep, important = args_of(node)
    images, count, width = sizes.shape(x)
    return images * ops.segment_flops("distinct", count, width, keep, important)


def _relevance(node: fx.Node, sizes: Sizes) -> int:
    return 2 * sizes.numel(args_of(node)[0])


def _determinant(node: fx.Node, sizes: Sizes) -> int:
    images, count, width = sizes.shape(args_of(node)[0])
    return images * ops.segment_flops("determinant", count, width, float(args_of(node)[2]), 0.0)


def _visionzip(node: fx.Node, sizes: Sizes) -> int:
    _, metric, dominant, contextual = args_of(node)
    images, count, width = sizes.shape(metric)
    return 2 * images * width * int(contextual) * (count - int(dominant) - int(contextual))


def _prumerge(node: fx.Node, sizes: Sizes) -> int:
    images, count, width = sizes.shape(args_of(node)[1])
    return 2 * images * width * count * count


def _raters(node: fx.Node, sizes: Sizes) -> int:
    visual, text = args_of(node)[:2]
    return 2 * sizes.numel(visual) * sizes.shape(text)[1]


def _rater_scores(node: fx.Node, sizes: Sizes) -> int:
    batch, _, rows, _ = sizes.shape(args_of(node)[0])
    return _row(node, sizes) + 2 * batch * rows * sizes.shape(args_of(node)[1][0])[2]


def _merge(node: fx.Node, sizes: Sizes) -> int:
    x, weights = args_of(node)
    return 2 * sizes.numel(x) * sizes.shape(weights)[1]


def _cross_attention(node: fx.Node, sizes: Sizes) -> int:
    q, k = args_of(node)[:2]
    return 4 * sizes.numel(q) * sizes.shape(k)[2]


def _mean(node: fx.Node, sizes: Sizes) -> int:
    return 2 * sizes.numel(args_of(node)[0])


def _tome(node: fx.Node, sizes: Sizes) -> int:
    images, _, count, width = sizes.shape(args_of(node)[0])
    return 2 * images * width * (count // 2) * (count - count // 2)


def _received(node: fx.Node, sizes: Sizes) -> int:
    return _encoder_attention(node, sizes) // 2


def _crossget(node: fx.Node, sizes: Sizes) -> int:
    """Three looks at all pairs: to rank tokens, to choose those that go, and where they go."""
    images, _, count, width = sizes.shape(args_of(node)[0])
    return 6 * images * width * count * count


def _cls_curve(node: fx.Node, sizes: Sizes) -> int:
    images, count, width = sizes.shape(args_of(node)[0])
    return 2 * images * (count - 1) * width


FLOPS: dict[Any, Callable[[fx.Node, Sizes], int]] = {
    aten.linear.default: _linear,
    ops.experts: _experts,
    aten.conv2d.default: _conv,
    aten.matmul.default: _matmul,
    ops.encoder_attention: _encoder_attention,
    ops.varlen_attention: _varlen_attention,
    ops.attention_row: _row,
    ops.attention_sums: _row,
    ops.attention_with_sums: _attention_with_sums,
    ops.neighbor_sums: _row,
    ops.received_attention: _row,
    ops.diverse_scores: _diverse,
    ops.distinct_scores: _distinct,
    ops.relevance: _relevance,
    ops.determinant_scores: _determinant,
    ops.visionzip: _visionzip,
    ops.prumerge: _prumerge,
    ops.raters: _raters,
    ops.rater_scores: _rater_scores,
    ops.rater_rank: _row,
    ops.merge_tokens: _merge,
    ops.cross_attention: _cross_attention,
    ops.mean_token: _mean,
    ops.tome: _tome,
    ops.received: _received,
    ops.column_means: _received,
    ops.segment_means: _segment_means,
    ops.segment_tokens: _segment_tokens,
    ops.crossget: _crossget,
    ops.cls_curve: _cls_curve,
}
