"""Packed sequences: their segments padded to the longest, so that one batched call serves all, and no loop.

x [n, ...]  ->  rows of segments [S, L, ...]  ->  [n, ...]
"""

from __future__ import annotations

import torch
from torch import fx

from foveate.backends.onnx.emit import END, Emitter
from foveate.backends.onnx.sorting import steps


class Segments:
    """The segments of a packed sequence, of which bounds count patches, so many to a token.

    lengths: int64 [S]; there: bool [S, L], where a padded segment has a token.
    """

    def __init__(self, emit: Emitter, bounds: fx.Node, patches: int = 1) -> None:
        self.emit = emit
        found = emit.cast(emit.value(bounds), torch.int64)
        if patches > 1:
            found = str(emit.op("Div", found, emit.constant(patches)))
        self.count = emit.op("Sub", emit.length(found, 0), emit.constant([1]))
        self.starts = emit.slice(found, 0, emit.constant([0]), self.count)
        self.ends = emit.slice(found, 0, emit.constant([1]), emit.constant([END]))
        self.lengths = emit.op("Sub", self.ends, self.starts)
        self.longest = emit.op("ReduceMax", self.lengths, emit.constant([0]), keepdims=1)
        within = emit.unsqueeze(steps(emit, self.longest), 0)
        self.there = emit.op("Less", within, emit.unsqueeze(self.lengths, 1))
        places = emit.op("Add", within, emit.unsqueeze(self.starts, 1))
        self.places = emit.op("Where", self.there, places, emit.constant(0))

    def padded(self, x: str, axis: int = 0) -> str:
        """Rows of segments: [.., n, ..] -> [.., S, L, ..]; what is padding means nothing."""
        return str(self.emit.op("Gather", x, self.places, axis=axis))

    def heads(self, x: fx.Node) -> str:
        """Queries, keys or values [1, H, n, e] of each segment: [S, H, L, e]."""
        tokens = self.emit.op("Squeeze", self.emit.value(x), self.emit.constant([0]))
        return str(self.emit.op("Transpose", self.padded(tokens, 1), perm=[1, 0, 2, 3]))

    def seen(self) -> str:
        """Which key of its segment a query sees: bool [S, L, L]."""
        sizes = self.emit.concat([self.count, self.longest, self.longest], 0)
        return str(self.emit.op("Expand", self.emit.unsqueeze(self.there, 1), sizes))

    def flat(self, rows: str, length: str, *sizes: int) -> str:
        """Rows of segments [S, L, *sizes] as one sequence of a length int64 [1]: [n, *sizes]."""
        emit, token = self.emit, steps(self.emit, length)
        # A token's segment is the number of segments that end before it.
        ended = emit.cast(emit.op("LessOrEqual", emit.unsqueeze(self.ends, 0), emit.unsqueeze(token, 1)), torch.int64)
        segment = emit.op("ReduceSum", ended, emit.constant([1]), keepdims=0)
        place = emit.op("Sub", token, emit.op("Gather", self.starts, segment, axis=0))
        place = emit.op("Add", place, emit.op("Mul", segment, self.longest))
        return str(emit.op("Gather", emit.reshape(rows, -1, *sizes), place, axis=0))
