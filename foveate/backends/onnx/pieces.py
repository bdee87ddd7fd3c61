"""What the writers of choosing and merging ops share. An image's tokens are numbered [I, n], and n is a number."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from foveate.backends.onnx.emit import END, Emitter, refusal
from foveate.errors import BackendError
from foveate.ir.rewriter import shape


def fixed(emit: Emitter, node: fx.Node, source: fx.Node, axis: int = 1) -> int:
    """How many tokens an image has; BackendError where it depends on the image."""
    count = shape(source)[axis]
    if not isinstance(count, int):
        raise BackendError(refusal(emit.program, node))
    return count


def steps(emit: Emitter, count: int) -> str:
    """0 to count - 1: int64 [count]."""
    return str(emit.op("Range", emit.constant(0), emit.constant(count), emit.constant(1)))


def filled(emit: Emitter, like: str, value: Any, *sizes: int) -> str:
    """A value [I, *sizes], for as many images as `like` has; the value is a number or can be expanded."""
    name = value if isinstance(value, str) else emit.constant(value)
    return str(emit.op("Expand", name, emit.concat([emit.length(like, 0), emit.constant(list(sizes))], 0)))


def ranked(emit: Emitter, scores: str, count: int, largest: bool = True) -> str:
    """The places of the `count` best of an axis: the last one. Of equal ones the first comes first."""
    return str(emit.op("TopK", scores, emit.constant([count]), outputs=2, axis=-1, largest=int(largest))[1])


def front(emit: Emitter, value: str, count: int) -> str:
    """The first tokens: of [I, n, ...]."""
    return emit.slice(value, 1, emit.constant([0]), emit.constant([count]))


def behind(emit: Emitter, value: str, count: int) -> str:
    """All tokens but the first: of [I, n, ...]."""
    return emit.slice(value, 1, emit.constant([count]), emit.constant([END]))


def every_other(emit: Emitter, value: str, start: int) -> str:
    """Tokens at even places, or from place 1 on those at odd ones."""
    one, two = emit.constant([1]), emit.constant([2])
    return str(emit.op("Slice", value, emit.constant([start]), emit.constant([END]), one, two))


def pick(emit: Emitter, value: str, places: str) -> str:
    """[I, n] at places [I, k]."""
    return str(emit.op("GatherElements", value, places, axis=1))


def pick_rows(emit: Emitter, value: str, places: str) -> str:
    """[I, n, C] at places [I, k]."""
    return str(emit.op("GatherND", value, emit.unsqueeze(places, 2), batch_dims=1))


def put(emit: Emitter, value: str, places: str, new: str, add: bool = False) -> str:
    """[I, n] with new values [I, k] in, or added to, places [I, k]."""
    return str(emit.op("ScatterElements", value, places, new, axis=1, reduction="add" if add else "none"))


def marked(emit: Emitter, places: str, chosen: int, count: int) -> str:
    """1 at the `chosen` places [I, chosen] of `count`, 0 elsewhere: int64 [I, count]."""
    return put(emit, filled(emit, places, 0, count), places, filled(emit, places, 1, chosen))


def unit(emit: Emitter, value: str) -> str:
    """Vectors of length 1 in fp32, as `torch.nn.functional.normalize` makes them."""
    wide = emit.cast(value, torch.float32)
    # ONNX Runtime's ReduceL2 rounds farther from torch's norm than this does, and picks hang on it.
    squares = emit.op("ReduceSum", emit.op("Mul", wide, wide), emit.constant([-1]), keepdims=1)
    length = emit.op("Sqrt", squares)
    return str(emit.op("Div", wide, emit.op("Max", length, emit.constant(1e-12))))


def products(emit: Emitter, some: str, others: str) -> str:
    """[I, a, e] by [I, b, e] -> [I, a, b]."""
    return str(emit.op("MatMul", some, emit.op("Transpose", others, perm=[0, 2, 1])))


def cosines(emit: Emitter, units: str) -> str:
    """Of unit vectors [I, n, e] to one another; two tokens' cosine is the same number whichever of them asks."""
    square = products(emit, units, units)
    upper = emit.op("Trilu", square, upper=1)
    above = emit.op("Trilu", square, emit.constant(1), upper=1)
    return str(emit.op("Add", upper, emit.op("Transpose", above, perm=[0, 2, 1])))


def same(emit: Emitter, count: int) -> str:
    """Whether two tokens are one: bool [n, n]."""
    places = steps(emit, count)
    return str(emit.op("Equal", emit.unsqueeze(places, 1), places))


def best(emit: Emitter, scores: str, axis: int = -1, keep: bool = False) -> str:
    """The place of the largest of an axis, the first of several."""
    return str(emit.op("ArgMax", scores, axis=axis, keepdims=int(keep), select_last_index=0))


def largest(emit: Emitter, scores: str) -> str:
    """The largest of the last axis."""
    return str(emit.op("ReduceMax", scores, emit.constant([-1]), keepdims=0))


def one_hot(emit: Emitter, places: str, count: int) -> str:
    """fp32 [..., count] that is 1 at the place, 0 elsewhere."""
    return emit.cast(str(emit.op("Equal", emit.unsqueeze(places, -1), steps(emit, count))), torch.float32)
