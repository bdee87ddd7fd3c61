"""What merging and choosing tokens inside the vision tower becomes; `foveate.kernels.tower` explains each step."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from foveate import ops
from foveate.backends.onnx.aten import dtype_of
from foveate.backends.onnx.emit import Emitter, Writer
from foveate.backends.onnx.pieces import (
    behind,
    best,
    cosines,
    every_other,
    filled,
    fixed,
    front,
    largest,
    marked,
    pick,
    products,
    put,
    ranked,
    same,
    steps,
    unit,
)
from foveate.ir.program import args_of
from foveate.ir.rewriter import shape
from foveate.kernels.tower import BLOCK

INF = math.inf

Matched = tuple[str, str, str, str]
"""As `foveate.kernels.tower.Matched`."""


def _tome(emit: Emitter, node: fx.Node) -> Matched:
    keys, size, source, merge, sort = args_of(node)
    count = fixed(emit, node, keys, 2)
    evens, odds = (count + 1) // 2, count // 2
    metric = _metric(emit, keys)
    alike = products(emit, every_other(emit, metric, 0), every_other(emit, metric, 1))
    target = best(emit, alike)
    # CLS, at place 0, goes last.
    cls = emit.op("Equal", steps(emit, evens), emit.constant(0))
    order = ranked(emit, emit.op("Where", cls, emit.constant(-INF), largest(emit, alike)), evens)
    going = front(emit, order, merge)
    staying, _ = emit.op("TopK", behind(emit, order, merge), emit.constant([evens - merge]), outputs=2, largest=0)
    two = emit.constant(2)
    numbers = filled(emit, metric, emit.constant([2 * i + 1 for i in range(odds)]), odds)
    stays = emit.concat([emit.op("Mul", staying, two), numbers], 1)
    if sort:
        by_source = ranked(emit, pick(emit, emit.value(source), stays), count - merge, largest=False)
        stays = pick(emit, stays, by_source)
    into = _slots(emit, stays, count, count - merge)
    odd = emit.op("Add", emit.op("Mul", pick(emit, target, going), two), emit.constant(1))
    into = put(emit, into, emit.op("Mul", going, two), pick(emit, into, odd))
    sizes = filled(emit, metric, 1.0, count) if size is None else emit.value(size)
    merged = put(emit, filled(emit, metric, 0.0, count - merge), into, sizes, add=True)
    weight = emit.op("Div", sizes, pick(emit, merged, into))
    return into, str(weight), merged, pick(emit, emit.value(source), stays)


def _crossget(emit: Emitter, node: fx.Node) -> Matched:
    keys, importance_node, size, source, merge = args_of(node)
    count = fixed(emit, node, keys, 2)
    metric, importance = _metric(emit, keys), emit.value(importance_node)
    place = steps(emit, count)
    ends = [emit.op("Equal", place, emit.constant(i)) for i in (0, count - 1)]
    bound = emit.op("Or", *ends)
    alike, never = cosines(emit, metric), emit.constant(-INF)
    # CLS and the cross token match nobody, and no token itself.
    hidden = emit.op("Or", emit.op("Or", bound, emit.unsqueeze(bound, 1)), same(emit, count))
    alike = emit.op("Where", hidden, never, alike)
    rank = ranked(emit, ranked(emit, largest(emit, alike), count), count, largest=False)
    before = emit.op("LessOrEqual", emit.unsqueeze(rank, 1), emit.unsqueeze(rank, 2))
    gain = largest(emit, emit.op("Where", before, never, alike))
    going = ranked(emit, emit.op("Sub", importance, gain), merge, largest=False)
    gone = marked(emit, going, merge, count)
    staying = emit.op("Where", emit.cast(emit.unsqueeze(gone, 1), torch.bool), never, alike)
    target = pick(emit, best(emit, staying), going)
    kept = ranked(emit, gone, count - merge, largest=False)
    into = _slots(emit, kept, count, count - merge)
    into = put(emit, into, going, pick(emit, into, target))
    sizes = filled(emit, metric, 1.0, count) if size is None else emit.value(size)
    merged = put(emit, filled(emit, metric, 0.0, count - merge), into, sizes, add=True)
    share = emit.op("Sigmoid", emit.op("Sub", pick(emit, importance, going), pick(emit, importance, target)))
    twice = emit.op("Mul", share, emit.constant(2.0))
    weight = put(emit, filled(emit, metric, 1.0, count), going, twice)
    weight = put(emit, weight, target, emit.op("Sub", emit.constant(1.0), twice), add=True)
    weight = emit.op("Div", emit.op("Mul", weight, sizes), pick(emit, merged, into))
    return into, str(weight), merged, pick(emit, emit.value(source), kept)


def _received(emit: Emitter, node: fx.Node) -> str:
    total, cross, count = _column_sums(emit, node)
    mean = emit.op("Div", emit.op("Sub", total, cross), emit.constant(float(count - 1)))
    return str(emit.op("Add", mean, cross))


def _column_means(emit: Emitter, node: fx.Node) -> str:
    total, _, count = _column_sums(emit, node)
    return str(emit.op("Div", total, emit.constant(float(count))))


def _column_sums(emit: Emitter, node: fx.Node) -> tuple[str, str, int]:
    """Sums over the rows of an attention matrix, mean over heads; its last row; and how many rows there are."""
    q, k, scale, *bias = args_of(node)
    count = fixed(emit, node, q, 2)
    queries, turned = emit.value(q), emit.op("Transpose", emit.value(k), perm=[0, 1, 3, 2])
    total = cross = ""
    for start in range(0, count, BLOCK):
        stop = min(start + BLOCK, count)
        rows = emit.slice(queries, 2, emit.constant([start]), emit.constant([stop]))
        logits = emit.cast(emit.op("MatMul", rows, turned), torch.float32)
        logits = emit.op("Mul", logits, emit.constant(float(scale)))
        if bias and bias[0] is not None:
            logits = emit.op("Add", logits, emit.unsqueeze(emit.value(bias[0]), 1, 2))
        matrix = emit.op("ReduceMean", emit.op("Softmax", logits, axis=3), emit.constant([1]), keepdims=0)
        summed = emit.op("ReduceSum", matrix, emit.constant([1]), keepdims=0)
        total = emit.op("Add", total, summed) if total else summed
        cross = emit.op("Gather", matrix, emit.constant(stop - start - 1), axis=1)
    return total, cross, count


def _join_tokens(emit: Emitter, node: fx.Node) -> str:
    x, into, weight, merged = args_of(node)
    count, width, dtype = fixed(emit, node, x), int(shape(x)[2]), dtype_of(x)
    value = emit.value(x)
    wide = emit.cast(value, torch.float32) if dtype != torch.float32 else value
    weighed = emit.op("Mul", wide, emit.unsqueeze(emit.value(weight), 2))
    places = filled(emit, value, emit.unsqueeze(emit.value(into), 2), count, width)
    out = put(emit, filled(emit, value, 0.0, count - merged, width), places, weighed, add=True)
    return emit.cast(out, dtype) if dtype != torch.float32 else out


def _cls_curve(emit: Emitter, node: fx.Node) -> tuple[str, str]:
    x, alpha, mode = args_of(node)
    count = fixed(emit, node, x) - 1
    wide = emit.cast(emit.value(x), torch.float32)
    cls = emit.op("Transpose", front(emit, wide, 1), perm=[0, 2, 1])
    logits = emit.op("Squeeze", emit.op("MatMul", behind(emit, wide, 1), cls), emit.constant([2]))
    scaled = emit.op("Mul", logits, emit.constant(float(shape(x)[2]) ** -0.5))
    curve, order = emit.op(
        "TopK", emit.op("Softmax", scaled, axis=1), emit.constant([count]), outputs=2, axis=1, largest=1
    )
    kept = _kept_by_curve(emit, curve, count, alpha, mode)
    gone = emit.op("GreaterOrEqual", ranked(emit, order, count, largest=False), kept)
    places = ranked(emit, emit.cast(gone, torch.int64), count, largest=False)
    return places, str(emit.op("Squeeze", kept, emit.constant([1])))


def _kept_by_curve(emit: Emitter, curve: str, count: int, alpha: float, mode: str) -> str:
    """How many tokens stay of falling curves [I, N]: int64 [I, 1]."""
    all_of_them = filled(emit, curve, count, 1)
    if count == 1:
        return all_of_them
    left = emit.constant([float(n) for n in range(count - 1, 0, -1)])
    most, least = (emit.op("Gather", curve, emit.constant([i]), axis=1) for i in (0, count - 1))
    fall = emit.op("Mul", left, emit.op("Sub", most, front(emit, curve, count - 1)))
    turn = emit.op("Add", best(emit, fall, keep=True), emit.constant(1))
    share = Fraction(alpha).limit_denominator(10**6)
    above, below = share.numerator, share.denominator
    if mode == "floor_add":
        kept = emit.op("Add", turn, emit.constant(-(-above * count // below)))
    else:
        # Rounded up; where it is below 0, any number below 1 will do.
        times = emit.op("Mul", turn, emit.constant(below + above if mode == "expand" else above))
        kept = emit.op("Div", emit.op("Add", times, emit.constant(below - 1)), emit.constant(below))
    kept = emit.op("Min", emit.op("Max", kept, emit.constant(1)), emit.constant(count))
    return str(emit.op("Where", emit.op("Equal", most, least), all_of_them, kept))


def _padded_keys(emit: Emitter, node: fx.Node) -> str:
    x, count = (emit.value(arg) for arg in args_of(node))
    length = emit.op("Squeeze", emit.length(x, 1))
    place = emit.op("Range", emit.constant(0), length, emit.constant(1))
    padding = emit.op("Greater", place, emit.unsqueeze(count, 1))
    return str(emit.op("Where", padding, emit.constant(-INF), emit.constant(0.0)))


def _metric(emit: Emitter, keys: fx.Node) -> str:
    """What tokens are compared by: the mean of their keys over heads."""
    wide = emit.cast(emit.value(keys), torch.float32)
    return unit(emit, emit.op("ReduceMean", wide, emit.constant([1]), keepdims=0))


def _slots(emit: Emitter, stays: str, count: int, kept: int) -> str:
    """The new place [I, n] of each token that stays [I, k]; 0 for the others."""
    return put(emit, filled(emit, stays, 0, count), stays, filled(emit, stays, steps(emit, kept), kept))


WRITERS: dict[Any, Writer] = {
    ops.tome: _tome,
    ops.crossget: _crossget,
    ops.received: _received,
    ops.column_means: _column_means,
    ops.join_tokens: _join_tokens,
    ops.cls_curve: _cls_curve,
    ops.padded_keys: _padded_keys,
}
