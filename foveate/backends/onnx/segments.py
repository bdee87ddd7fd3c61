"""What choosing tokens of images in a packed sequence becomes; `foveate.kernels.segments` explains each step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from foveate import ops
from foveate.backends.onnx.emit import Emitter, Writer, refusal
from foveate.backends.onnx.packed import Segments
from foveate.backends.onnx.pieces import best, cosines, pick, unit
from foveate.backends.onnx.scoring import LOWEST, Scoring
from foveate.backends.onnx.selection import floor_share
from foveate.backends.onnx.sorting import ranks, steps
from foveate.errors import BackendError
from foveate.ir.program import args_of
from foveate.kernels.relevance import ROUNDING

INF = math.inf


def _segment_means(emit: Emitter, node: fx.Node) -> str:
    q, k, bounds, scale = args_of(node)
    segments = Segments(emit, bounds)
    scoring = Scoring.of(q, k, scale)
    rows = scoring.rows(emit, segments.heads(q), [segments.heads(k)], segments.seen(), hidden=LOWEST)
    real = emit.cast(emit.unsqueeze(segments.there, 1, 3), torch.float32)
    sums = emit.op("ReduceSum", emit.op("Mul", rows, real), emit.constant([2]), keepdims=0)
    counts = emit.cast(emit.unsqueeze(segments.lengths, 1), torch.float32)
    means = emit.op("Div", emit.op("ReduceMean", sums, emit.constant([1]), keepdims=0), counts)
    return segments.flat(means, emit.length(emit.value(q), 2))


def _segment_tokens(emit: Emitter, node: fx.Node) -> str:
    by, x, row, bounds, patches, keep, _ = args_of(node)
    segments = Segments(emit, bounds, patches)
    wanted = emit.unsqueeze(floor_share(emit, segments.lengths, keep), 1)
    if by == "row":
        scores = emit.op("ReduceSum", emit.reshape(emit.value(row), -1, patches), emit.constant([1]), keepdims=0)
        scores = emit.op("Where", segments.there, segments.padded(str(scores)), emit.constant(-INF))
        kept = emit.op("Less", ranks(emit, str(scores)), wanted)
    elif by in PICKED:
        kept = PICKED[by](emit, segments, unit(emit, segments.padded(emit.value(x))), wanted)
    else:
        raise BackendError(refusal(emit.program, node))
    return segments.flat(str(kept), emit.length(emit.value(x), 0))


def _diverse(emit: Emitter, segments: Segments, units: str, wanted: str) -> str:
    """As `foveate.backends.onnx.vision` picks from one image; a segment has made its picks after `wanted` of them."""
    there, tokens = segments.there, steps(emit, segments.longest)
    apart = emit.op("Sub", emit.constant(1.0), cosines(emit, units))
    same = emit.op("Equal", emit.unsqueeze(tokens, 1), tokens)
    hidden = emit.op("Or", same, emit.unsqueeze(emit.op("Not", there), 1))
    nearest = emit.op("ReduceMin", emit.op("Where", hidden, emit.constant(INF), apart), emit.constant([-1]), keepdims=0)
    nearest = emit.op("Where", there, nearest, emit.constant(-INF))

    def step(number: str, nearest: str, kept: str) -> list[str]:
        token = best(emit, nearest, keep=True)
        hot = emit.op("Equal", token, tokens)
        # From the first pick on, nearest is the distance to what is picked.
        first = emit.op("And", emit.op("Equal", number, emit.constant(0)), there)
        known = emit.op("Where", first, emit.constant(INF), nearest)
        distance = emit.op("GatherND", apart, token, batch_dims=1)
        nearest = emit.op("Where", hot, emit.constant(-INF), emit.op("Min", known, distance))
        return [nearest, _and_also(emit, kept, hot, number, wanted)]

    none = emit.op("And", there, emit.op("Not", there))
    return emit.loop(_most(emit, wanted), {nearest: torch.float32, none: torch.bool}, step)[1]


def _determinant(emit: Emitter, segments: Segments, units: str, wanted: str) -> str:
    """As `foveate.backends.onnx.vision` picks from one image, where all matter the same."""
    there, tokens, most = segments.there, steps(emit, segments.longest), _most(emit, wanted)
    picks = emit.op("Range", emit.constant(0), most, emit.constant(1))
    zero, gone = emit.constant(0.0), emit.constant(-INF)
    own = emit.op("Where", there, emit.constant(1.0), gone)

    def step(number: str, gains: str, columns: str, kept: str) -> list[str]:
        token = best(emit, gains, keep=True)
        hot = emit.op("Equal", token, tokens)
        gain = pick(emit, gains, token)
        turned = emit.unsqueeze(emit.op("GatherND", units, token, batch_dims=1), 2)
        alike = emit.op("Squeeze", emit.op("MatMul", units, turned), emit.constant([2]))
        # Columns of picks to come are 0.
        upright = emit.op("Transpose", columns, perm=[0, 2, 1])
        column = emit.unsqueeze(emit.op("GatherND", upright, token, batch_dims=1), 2)
        known = emit.op("Squeeze", emit.op("MatMul", upright, column), emit.constant([2]))
        new = emit.op("Div", emit.op("Sub", alike, known), emit.op("Sqrt", gain))
        new = emit.op("Where", emit.op("Greater", gain, zero), new, zero)
        place = emit.unsqueeze(emit.op("Equal", picks, number), 1)
        columns = emit.op("Where", place, emit.unsqueeze(new, 1), columns)
        left = emit.op("Sub", gains, emit.op("Mul", new, new))
        rounded = emit.op("And", emit.op("Less", left, emit.constant(ROUNDING)), emit.op("Greater", left, gone))
        left = emit.op("Where", hot, gone, emit.op("Where", rounded, zero, left))
        return [left, columns, _and_also(emit, kept, hot, number, wanted)]

    sizes = emit.concat([segments.count, emit.unsqueeze(most, 0), segments.longest], 0)
    columns = emit.op("Expand", zero, sizes)
    none = emit.op("And", there, emit.op("Not", there))
    return emit.loop(most, {own: torch.float32, columns: torch.float32, none: torch.bool}, step)[2]


PICKED = {"diverse": _diverse, "determinant": _determinant}
"""What is picked one by one: (padded unit vectors [S, L, D], how many stay of each segment [S, 1]) -> bool [S, L]."""


def _most(emit: Emitter, wanted: str) -> str:
    """The most tokens that a segment keeps: int64 []."""
    return str(emit.op("ReduceMax", wanted, emit.constant([0, 1]), keepdims=0))


def _and_also(emit: Emitter, kept: str, hot: str, number: str, wanted: str) -> str:
    """What was kept, and the pick of that number in segments that are not done."""
    return str(emit.op("Or", kept, emit.op("And", hot, emit.op("Less", number, wanted))))


WRITERS: dict[Any, Writer] = {
    ops.segment_means: _segment_means,
    ops.segment_tokens: _segment_tokens,
}
