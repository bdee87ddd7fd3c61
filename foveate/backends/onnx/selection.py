"""What choosing and gathering tokens becomes: TopK, and gathers along the token axis."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import fx

from foveate import ops
from foveate.backends.onnx.emit import Emitter, Writer
from foveate.backends.onnx.sorting import steps
from foveate.ir.program import args_of
from foveate.ir.rewriter import shape

BITS = 12
"""Of a row or column number, as in `foveate.kernels.scores`."""

MASK = 0x7FFFFFFF

MOST = 2**16
"""Tokens up to which a share's floor is held to Python's."""

SHORT = 2**14
"""Tokens up to which there is a table of them, where no fraction has them all."""

ONE = 2**40
"""The denominator of such fractions; times `MOST` it is far from overflow."""


def _top_tokens(emit: Emitter, node: fx.Node) -> tuple[str, str]:
    """The best go to the front, and back into their old order by a second TopK; ONNX has no stable sort.

    TopK gives the lower index of two equal scores first. One slot is added to each, because it takes no empty axis.
    """
    scores, order, keep, *more = args_of(node)
    whole = more[0] if more and more[0] is not None else order
    score, place = emit.value(scores), emit.value(order)
    pad = emit.constant(ops.PAD)
    alive = emit.op("Not", emit.op("Equal", place, pad))
    counted = emit.op("Not", emit.op("Equal", emit.value(whole), pad))
    tokens = emit.length(score, 1)
    slots = floor_share(emit, emit.length(emit.value(whole), 1), keep)
    most = emit.op("Min", slots, tokens)
    one = emit.constant([1])
    # Padding goes behind every real token, and the slot that was added behind padding.
    lowest = emit.op("Where", alive, score, emit.constant(float("-inf")))
    padded = emit.op("Pad", lowest, emit.constant([0, 0, 0, 1]), emit.constant(float("-inf")))
    _, ranked = emit.op("TopK", padded, emit.op("Add", most, one), outputs=2, axis=1)
    ranked = emit.slice(ranked, 1, emit.constant([0]), most)
    real = emit.op("ReduceSum", emit.cast(alive, torch.int64), one, keepdims=1)
    wanted = floor_share(emit, emit.op("ReduceSum", emit.cast(counted, torch.int64), one, keepdims=1), keep)
    count = emit.op("Min", wanted, real)
    zero = emit.constant(0)
    spare = emit.op("GreaterOrEqual", emit.unsqueeze(steps(emit, most), 0), count)
    behind = emit.op("Where", spare, tokens, ranked)
    behind = emit.op("Pad", behind, emit.constant([0, 0, 0, 1]), emit.constant(2**62))
    index, _ = emit.op("TopK", behind, emit.op("Add", most, one), outputs=2, axis=1, largest=0)
    index = emit.slice(index, 1, emit.constant([0]), most)
    # Slots that no token is left for stand behind the others.
    room = emit.op("Sub", slots, most)
    ends = emit.concat([emit.constant([0, 0, 0]), room], 0)
    index = emit.op("Pad", index, ends, emit.op("Squeeze", tokens))
    gone = emit.op("Equal", index, tokens)
    index = emit.op("Where", gone, zero, index)
    # One more column, so that there is a token 0 to point at even where there is no token.
    wide = emit.op("Pad", place, emit.constant([0, 0, 0, 1]), pad)
    kept = emit.op("Where", gone, pad, emit.op("GatherElements", wide, index, axis=1))
    return str(index), str(kept)


def floor_share(emit: Emitter, count: str, keep: float) -> str:
    """floor(keep * count) as Python computes it with floats, by integers: not every runtime has fp64."""
    counts = np.arange(MOST + 1)
    wanted = np.floor(keep * counts.astype(np.float64)).astype(np.int64)
    exact = Fraction(keep) * ONE
    for near in (math.floor(exact), math.ceil(exact)):
        if np.array_equal(near * counts // ONE, wanted):
            return str(emit.op("Div", emit.op("Mul", count, emit.constant(near)), emit.constant(ONE)))
    # No fraction rounds as the product of two floats does: 0.7 * 10 is 7.0, and 0.7 is less than that.
    table = emit.constant(wanted[: SHORT + 1].tolist(), torch.int32)
    return emit.cast(str(emit.op("Gather", table, count)), torch.int64)


def _take_tokens(emit: Emitter, node: fx.Node) -> str:
    x, index, dim = args_of(node)
    value, places = emit.value(x), emit.value(index)
    rank = len(shape(x))
    dim %= rank
    if shape(x)[0] == 1 and shape(index)[0] != 1:
        sizes = [emit.length(places, 0), *(emit.constant([1]) for _ in range(rank - 1))]
        value = str(emit.op("Expand", value, emit.concat(sizes, 0)))
    # GatherND moves whole blocks behind the token axis.
    order = [0, dim, *(axis for axis in range(1, rank) if axis != dim)]
    back = [order.index(axis) for axis in range(rank)]
    turned = value if dim == 1 else emit.op("Transpose", value, perm=order)
    taken = emit.op("GatherND", turned, emit.unsqueeze(places, 2), batch_dims=1)
    return str(taken if dim == 1 else emit.op("Transpose", taken, perm=back))


def _places(emit: Emitter, node: fx.Node) -> str:
    value = emit.value(args_of(node)[0])
    numbers = steps(emit, emit.length(value, 1))
    sizes = emit.concat([emit.length(value, 0), emit.constant([1])], 0)
    return str(emit.op("Expand", emit.unsqueeze(numbers, 0), sizes))


def _random_scores(emit: Emitter, node: fx.Node) -> str:
    """The hash of `foveate.kernels.scores`; divisions stand for its shifts, of numbers that are not negative."""
    order, seed = args_of(node)
    value = emit.value(order)
    mask = emit.constant(MASK)
    x = emit.op("Mul", steps(emit, emit.length(value, 1)), emit.constant(0x2C1B3C6D))
    x = emit.op("BitwiseAnd", emit.op("Add", x, emit.constant(seed & MASK)), mask)
    for multiplier in (0x45D9F3B, 0x297A2D39, 0x119DE1F3):
        mixed = emit.op("BitwiseXor", emit.op("Div", x, emit.constant(2**15)), x)
        x = emit.op("BitwiseAnd", emit.op("Mul", mixed, emit.constant(multiplier)), mask)
    score = emit.cast(emit.op("Div", x, emit.constant(2**7)), torch.float32)
    score = emit.op("Mul", score, emit.constant(2.0**-24))
    sizes = emit.concat([emit.length(value, 0), emit.constant([1])], 0)
    return str(emit.op("Expand", emit.unsqueeze(score, 0), sizes))


def _grid_scores(emit: Emitter, node: fx.Node) -> str:
    """The digits of `foveate.kernels.scores`, all bits side by side: [B, n, BITS]."""
    coords = emit.value(args_of(node)[0])
    powers = emit.constant([2**bit for bit in range(BITS)])
    # A token that has no place has negative numbers, whose bits are those of the number plus a power of two.
    up = emit.op("Mod", coords, emit.constant(2**BITS))
    row, column = (
        emit.op(
            "Mod",
            emit.op("Div", emit.unsqueeze(emit.op("Gather", up, emit.constant(i), axis=2), 2), powers),
            emit.constant(2),
        )
        for i in (1, 2)
    )
    differ = emit.op("Mod", emit.op("Add", row, column), emit.constant(2))
    digit = emit.op("Add", emit.op("Mul", differ, emit.constant(2)), row)
    weights = emit.constant([4 ** (BITS - 1 - bit) for bit in range(BITS)])
    total = emit.op("ReduceSum", emit.op("Mul", digit, weights), emit.constant([2]), keepdims=0)
    return str(emit.op("Neg", emit.cast(total, torch.float32)))


WRITERS: dict[Any, Writer] = {
    ops.top_tokens: _top_tokens,
    ops.take_tokens: _take_tokens,
    ops.places: _places,
    ops.random_scores: _random_scores,
    ops.grid_scores: _grid_scores,
}
