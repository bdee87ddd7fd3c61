"""A tensor that grows without copying itself at every step."""

from __future__ import annotations

from torch import Tensor

GROWTH = 128
"""Room for this many more text tokens is added whenever the text part is full."""


class Growing:
    """A tensor [B, ..., tokens at `dim`, ...] that grows without copying itself at every step; free room is `empty`."""

    def __init__(self, start: Tensor, dim: int, empty: int = 0, most: int | None = None) -> None:
        self.dim = dim
        self.empty = empty
        self.most = most  # tokens that there will ever be
        self.length = 0
        self.buffer = start.narrow(dim, 0, 0)
        self.append(start)

    def reserve(self, tokens: int) -> None:
        """Make room for so many more."""
        end = self.length + tokens
        if end > self.buffer.shape[self.dim]:
            shape = list(self.buffer.shape)
            shape[self.dim] = end + GROWTH if self.most is None else max(end, min(end + GROWTH, self.most))
            buffer = self.buffer.new_full(shape, self.empty)
            buffer.narrow(self.dim, 0, self.length).copy_(self.view())
            self.buffer = buffer

    def append(self, new: Tensor) -> None:
        """Write `new` behind what is there."""
        self.reserve(new.shape[self.dim])
        self.buffer.narrow(self.dim, self.length, new.shape[self.dim]).copy_(new)
        self.length += new.shape[self.dim]

    def view(self) -> Tensor:
        """What has been written."""
        return self.buffer.narrow(self.dim, 0, self.length)

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order (beam search)."""
        self.buffer = self.buffer.index_select(0, rows)
