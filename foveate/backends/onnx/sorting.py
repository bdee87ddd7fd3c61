"""Sorting that every way of choosing tokens needs, stable as torch's: of equal values the lower index comes first.

ONNX has no sort, but a TopK that gives the lower index first among equals. ONNX Runtime's takes no empty axis, so that
one slot is added to the axis, which comes last.
"""

from __future__ import annotations

from typing import Any

import torch

from foveate.backends.onnx.emit import Emitter


def widened(emit: Emitter, value: str, rank: int, axis: int, fill: Any, slots: int = 1) -> str:
    """A value with more slots at the end of an axis; `fill` is a Python number."""
    ends = [0] * (2 * rank)
    ends[rank + axis] = slots
    if isinstance(fill, bool):
        # Not every runtime pads bool.
        wide = emit.op("Pad", emit.cast(value, torch.int64), emit.constant(ends), emit.constant(int(fill)))
        return emit.cast(str(wide), torch.bool)
    return str(emit.op("Pad", value, emit.constant(ends), emit.constant(fill)))


def steps(emit: Emitter, count: str) -> str:
    """0, 1, ... for int64 [1]: int64 [count]."""
    return str(emit.op("Range", emit.constant(0), emit.op("Squeeze", count), emit.constant(1)))


def best(emit: Emitter, values: str, rank: int, count: str) -> str:
    """Where the `count` largest fp32 values of the last axis stand, the largest first; count at most its length."""
    wide = widened(emit, values, rank, rank - 1, float("-inf"))
    return _first(emit, wide, rank, count, 1)[1]


def rising(emit: Emitter, values: str, rank: int, count: str) -> tuple[str, str]:
    """The `count` smallest integers of the last axis, rising, and where they stand; count at most its length."""
    return _first(emit, widened(emit, values, rank, rank - 1, 2**63 - 1), rank, count, 0)


def _first(emit: Emitter, wide: str, rank: int, count: str, largest: int) -> tuple[str, str]:
    more = emit.op("Add", count, emit.constant([1]))
    found = emit.op("TopK", wide, more, outputs=2, axis=rank - 1, largest=largest)
    values, places = (emit.slice(each, rank - 1, emit.constant([0]), count) for each in found)
    return values, places


def ranks(emit: Emitter, values: str, largest: bool = True) -> str:
    """Each value's place among those of its row when they are sorted: fp32 [B, n], n >= 1 -> int64 [B, n]."""
    count = emit.length(values, 1)
    _, places = emit.op("TopK", values, count, outputs=2, axis=1, largest=int(largest))
    numbers = emit.op("Expand", emit.unsqueeze(steps(emit, count), 0), emit.op("Shape", places))
    return str(emit.op("ScatterElements", places, places, numbers, axis=1))


def marked(emit: Emitter, chosen: str, width: str) -> str:
    """Where a bool [B, n] is true, rising: int64 [B, width], width at most n; n where there are fewer."""
    count = emit.length(chosen, 1)
    return rising(emit, str(emit.op("Where", chosen, steps(emit, count), count)), 2, width)[0]


def counted(emit: Emitter, chosen: str) -> str:
    """How many of each row are true: bool [B, n] -> int64 [B, 1]."""
    return str(emit.op("ReduceSum", emit.cast(chosen, torch.int64), emit.constant([1]), keepdims=1))
