"""A tensor that grows without copying itself at every step."""

from __future__ import annotations

from torch import Tensor

GROWTH = 128
"""Room for this many more text tokens is added whenever the text part is full."""


class Growing:
    """A tensor [B, ..., tokens at `dim`, ...] that grows without copying itself at every step.

    Its free room means nothing until somebody asks for the `whole`, where it is `empty`: that is a lot to write.
    """

    def __init__(self, start: Tensor, dim: int, empty: int = 0, most: int | None = None) -> None:
        self.dim = dim
        self.empty = empty
        self.most = most  # tokens that there will ever be
        self.length = 0
        self.buffer = start.narrow(dim, 0, 0)
        self._filled = False
        self.append(start)

    def reserve(self, tokens: int) -> None:
        """Make room for so many more."""
        end = self.length + tokens
        if end > self.buffer.shape[self.dim]:
            shape = list(self.buffer.shape)
            shape[self.dim] = end + GROWTH if self.most is None else max(end, min(end + GROWTH, self.most))
            buffer = self.buffer.new_empty(shape)
            buffer.narrow(self.dim, 0, self.length).copy_(self.view())
            self.buffer, self._filled = buffer, False

    def append(self, new: Tensor) -> None:
        """Write `new` behind what is there."""
        self.reserve(new.shape[self.dim])
        self.buffer.narrow(self.dim, self.length, new.shape[self.dim]).copy_(new)
        self.length += new.shape[self.dim]

    def lengthen(self, tokens: int) -> None:
        """Let so many of the free room's tokens belong to what is there."""
        self.reserve(tokens)
        self.buffer.narrow(self.dim, self.length, tokens).fill_(self.empty)
        self.length += tokens

    def view(self) -> Tensor:
        """What has been written."""
        return self.buffer.narrow(self.dim, 0, self.length)

    def whole(self) -> Tensor:
        """What has been written, and behind it the free room."""
        if not self._filled:
            free = self.buffer.shape[self.dim] - self.length
            self.buffer.narrow(self.dim, self.length, free).fill_(self.empty)
            self._filled = True
        return self.buffer

    def select_rows(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order (beam search)."""
        self.buffer = self.buffer.index_select(0, rows)
