"""What leaves a cache of keys and values: what queries pay to keys, all of them at once, and which keys stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from foveate import ops
from foveate.backends.onnx.attention import around, attention, visible
from foveate.backends.onnx.emit import Emitter, Writer
from foveate.backends.onnx.fit import real
from foveate.backends.onnx.scoring import softmaxed
from foveate.backends.onnx.selection import floor_share
from foveate.backends.onnx.sorting import best, counted, marked, rising, steps, widened
from foveate.ir.attention import Attention
from foveate.ir.program import args_of
from foveate.ir.rewriter import shape


def _attention_sums(emit: Emitter, node: fx.Node) -> str:
    q, k, q_order, k_order, scale = args_of(node)
    return _summed(emit, q, k, q_order, visible(emit, [q_order], k_order), scale)


def _attention_with_sums(emit: Emitter, node: fx.Node) -> tuple[str, str]:
    asked = Attention.of(node)
    parts = [
        _summed(emit, q, asked.k, order, visible(emit, [order], asked.k_order), asked.scale)
        for q, order in zip(asked.q, asked.q_order, strict=True)
    ]
    return attention(emit, node), str(emit.op("Add", *parts))


def _neighbor_sums(emit: Emitter, node: fx.Node) -> str:
    q, k, q_order, k_order, q_coords, coords, radius, metric, causal, see_text, scale = args_of(node)
    seen = around(emit, (q_order, q_coords), (k_order, coords), radius, metric, causal, see_text)
    return _summed(emit, q, k, q_order, seen, scale)


def _summed(emit: Emitter, q: fx.Node, k: Sequence[fx.Node], q_order: fx.Node, seen: str, scale: float) -> str:
    """Rows of queries that are no padding, summed over them and over the heads of a key head."""
    there = emit.unsqueeze(real(emit, emit.value(q_order)), 1, 3)
    # A padded query may see nothing, and its row be no number.
    rows = emit.op("Where", there, softmaxed(emit, q, k, seen, scale), emit.constant(0.0))
    total = str(emit.op("ReduceSum", rows, emit.constant([2]), keepdims=0))
    heads, kv_heads = (int(shape(n)[1]) for n in (q, k[0]))
    if heads == kv_heads:
        return total
    grouped = emit.reshape(total, emit.length(total, 0), kv_heads, heads // kv_heads, emit.length(total, 2))
    return str(emit.op("ReduceSum", grouped, emit.constant([2]), keepdims=0))


def _window_tokens(emit: Emitter, node: fx.Node) -> tuple[str, str]:
    order, others, window = args_of(node)
    own = emit.value(order)
    rows = widened(emit, emit.concat([own, *(emit.value(x) for x in others)], 1), 2, 1, ops.PAD, window)
    # Padding gets places before all real tokens, so that the largest are the last real ones.
    places = emit.op("Where", real(emit, rows), rows, emit.constant(-1))
    last, _ = emit.op("TopK", places, emit.constant([window]), outputs=2, axis=1)
    first = emit.op("Max", emit.slice(last, 1, emit.constant([window - 1]), emit.constant([window])), emit.constant(0))
    chosen = emit.op("And", real(emit, own), emit.op("GreaterOrEqual", own, first))
    count = emit.length(own, 1)
    index = marked(emit, str(chosen), str(emit.op("Min", emit.constant([window]), count)))
    spare = emit.op("Equal", index, count)
    index = str(emit.op("Where", spare, emit.constant(0), index))
    wide = widened(emit, own, 2, 1, ops.PAD)
    return index, str(emit.op("Where", spare, emit.constant(ops.PAD), emit.op("GatherElements", wide, index, axis=1)))


class _Rows:
    """Tokens of all streams in the order of their rows.

    in_row int64 [B, n]: where each stands; count [B, 1]: how many a row has; column [n]: 0, 1, ...
    """

    def __init__(self, emit: Emitter, orders: Sequence[fx.Node], heads: int) -> None:
        self.emit, self.heads = emit, heads
        self.order = emit.concat([emit.value(x) for x in orders], 1)
        self.total = emit.length(self.order, 1)
        _, self.in_row = rising(emit, self.order, 2, self.total)
        self.count = counted(emit, real(emit, self.order))
        self.column = steps(emit, self.total)

    def by_head(self, value: str) -> str:
        """[B, n] as [B, Hk, n]."""
        sizes = [self.emit.length(value, 0), self.emit.constant([self.heads]), self.emit.length(value, 1)]
        return str(self.emit.op("Expand", self.emit.unsqueeze(value, 1), self.emit.concat(sizes, 0)))

    def sorted(self, values: str) -> str:
        """Values [B, Hk, n] in the order of the row."""
        return str(self.emit.op("GatherElements", values, self.by_head(self.in_row), axis=2))

    def ranked(self, values: str, late: str) -> str:
        """Sorted values, where tokens that are late, bool [B, n], come before all and padding behind."""
        emit = self.emit
        values = emit.op("Where", emit.unsqueeze(late, 1), emit.constant(math.inf), values)
        gone = emit.op("GreaterOrEqual", self.column, self.count)
        return str(emit.op("Where", emit.unsqueeze(str(gone), 1), emit.constant(-math.inf), values))

    def best(self, values: str, keep: str, slots: str) -> tuple[str, str]:
        """Index and places of the `keep` [B, 1] largest sorted values [B, Hk, n], in the order of the row."""
        emit = self.emit
        found = best(emit, values, 3, slots)
        spare = emit.unsqueeze(str(emit.op("GreaterOrEqual", steps(emit, slots), keep)), 1)
        found, _ = rising(emit, str(emit.op("Where", spare, self.total, found)), 3, slots)
        spare = emit.op("Equal", found, self.total)
        none, pad = emit.constant(0), emit.constant(ops.PAD)
        found = str(emit.op("Where", spare, none, found))
        index = emit.op("GatherElements", self.by_head(self.in_row), found, axis=2)
        index = str(emit.op("Where", spare, none, index))
        places = emit.op("GatherElements", self.by_head(self.order), index, axis=2)
        return index, str(emit.op("Where", spare, pad, places))


def _snapkv_tokens(emit: Emitter, node: fx.Node) -> tuple[str, str]:
    scores, orders, capacity, window, kernel, pooling = args_of(node)
    rows = _Rows(emit, orders, int(shape(scores)[1]))
    late = emit.op("GreaterOrEqual", rows.column, emit.op("Sub", rows.count, emit.constant([window])))
    beyond = 0.0 if pooling == "avg" else -math.inf
    pooled = emit.op("Where", emit.unsqueeze(str(late), 1), emit.constant(beyond), rows.sorted(emit.value(scores)))
    around_each: dict[str, Any] = {"kernel_shape": [kernel], "pads": [kernel // 2] * 2, "strides": [1]}
    if pooling == "avg":
        pooled = emit.op("AveragePool", pooled, count_include_pad=1, **around_each)
    else:
        pooled = emit.op("MaxPool", pooled, **around_each)
    values = rows.ranked(str(pooled), str(late))
    slots = _kept(emit, rows.total, capacity, window)
    return rows.best(values, _kept(emit, rows.count, capacity, window), slots)


def _kept(emit: Emitter, tokens: str, capacity: float, window: int) -> str:
    """`foveate.ops.kv.snapkv_count`, of int64."""
    if capacity >= 1:
        return str(emit.op("Min", tokens, emit.constant([int(capacity)])))
    wanted = emit.op("Max", floor_share(emit, tokens, capacity), emit.constant([window]))
    return str(emit.op("Min", tokens, wanted))


def _heavy_tokens(emit: Emitter, node: fx.Node) -> tuple[str, str, str, str]:
    sums, orders, heavy, recent = args_of(node)
    rows = _Rows(emit, orders, int(shape(sums)[1]))
    most, latest = _budget(emit, rows.count, heavy, recent)
    budget = emit.concat([most, latest], 1)
    late = emit.op("GreaterOrEqual", rows.column, emit.op("Sub", rows.count, latest))
    values = rows.ranked(rows.sorted(emit.value(sums)), str(late))
    room = emit.op("Add", *_budget(emit, emit.unsqueeze(rows.total, 0), heavy, recent))
    slots = str(emit.op("Min", rows.total, emit.op("Squeeze", room, emit.constant([0]))))
    keep = emit.op("Min", rows.count, emit.op("Add", most, latest))
    index, places = rows.best(values, str(keep), slots)
    kept = emit.op("GatherElements", emit.value(sums), index, axis=2)
    spare = emit.op("Equal", places, emit.constant(ops.PAD))
    return index, places, str(emit.op("Where", spare, emit.constant(0.0), kept)), budget


def _budget(emit: Emitter, tokens: str, heavy: float, recent: float) -> tuple[str, str]:
    """How many heavy and recent tokens rows of so many hold: int64 [B, 1] each."""
    found = []
    for number, rounded in ((heavy, "Floor"), (recent, "Ceil")):
        if number < 1:
            product = emit.op("Mul", emit.cast(tokens, torch.float64), emit.constant(float(number), torch.float64))
            found.append(emit.cast(str(emit.op(rounded, product)), torch.int64))
        else:
            sizes = emit.op("Shape", tokens)
            found.append(str(emit.op("Expand", emit.constant([int(number)]), sizes)))
    return found[0], found[1]


def _take_keys(emit: Emitter, node: fx.Node) -> str:
    x, index = args_of(node)
    whole = emit.concat([emit.value(stream) for stream in x], 2)
    return str(emit.op("GatherND", whole, emit.unsqueeze(emit.value(index), 3), batch_dims=2))


WRITERS: dict[Any, Writer] = {
    ops.attention_sums: _attention_sums,
    ops.attention_with_sums: _attention_with_sums,
    ops.neighbor_sums: _neighbor_sums,
    ops.window_tokens: _window_tokens,
    ops.snapkv_tokens: _snapkv_tokens,
    ops.heavy_tokens: _heavy_tokens,
    ops.take_keys: _take_keys,
}
