"""How the forms cut a call. Both count the query-key pairs of one head that their products span."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from foveate.neighborhood.grids import Call, Grid, Grids

LANES = 16
"""Elements of a vector: softmaxes run one by one over the keys behind the last whole vector."""

CHUNK = 2**18
"""So many elements of keys a CPU thread gathers at once: they are used while they are still in its cache."""

CHUNK_ON_GPU = 2**26
"""The same on a GPU, which needs much work a launch."""


@dataclass(frozen=True)
class Block:
    """Queries `start` to `stop` of the rows `batch`, and the ranges of visual and of text keys that they may see.

    `kind`: "causal", each sees the visual keys up to itself; "all", each sees every key; "grid", both are whole rows of
    an image of so many `columns`, at most `far` of them apart; "mask", orders and coordinates decide.
    """

    kind: str
    batch: tuple[int, int]
    start: int
    stop: int
    keys: tuple[int, int]
    text: tuple[int, int]
    columns: int = 0
    far: int = 0

    @property
    def rows(self) -> int:
        """Queries, over the batch."""
        return (self.batch[1] - self.batch[0]) * (self.stop - self.start)

    @property
    def width(self) -> int:
        """Keys of each."""
        return self.keys[1] - self.keys[0] + self.text[1] - self.text[0]

    @property
    def pairs(self) -> int:
        """Pairs that the products span."""
        return self.rows * self.width


def blocks(call: Call, grids: Grids | None, size: int) -> tuple[Block, ...]:
    """The call in blocks of about `size` queries; those of an image skip the keys that are too many rows away."""
    if grids is not None:
        return tuple(block for grid in grids for block in _of_image(call, grid, size))
    bounds = [*range(0, call.tokens, size), call.tokens]
    ranges = (0, call.tokens), (0, call.text)
    return tuple(Block("mask", (0, call.batch), a, b, *ranges) for a, b in pairwise(bounds))


def _of_image(call: Call, grid: Grid, size: int) -> Iterator[Block]:
    """The blocks of one image: whole rows of it, about `size` queries."""
    height, width = call.laid(grid)
    batch, text, first = (grid.row, grid.row + 1), (grid.text_start, grid.text_stop), grid.start
    if call.covers(grid) and not (call.causal and grid.text):
        kind, stop = "causal" if call.causal else "all", first + grid.tokens
        yield Block(kind, batch, first, stop, (first, stop), text)
        return
    rows = max(1, size // width)
    far = rows - 1 + min(call.radius, height - 1)
    for top in range(0, height, rows):
        end = min(top + rows, height)
        above, below = max(0, top - call.radius), end if call.causal else min(height, end + call.radius)
        start, stop, key, last = (first + row * width for row in (top, end, above, below))
        yield Block("grid", batch, start, stop, (key, last), text, width, far)


@dataclass(frozen=True)
class Tiles:
    """`count` tiles of `rows` x `columns` queries, with `span` x `reach` keys around them and up to `text` text keys.

    The former begin `above` rows over the tile and `aside` columns left of it. `step` tiles are a chunk.
    """

    count: int
    rows: int
    columns: int
    above: int
    span: int
    aside: int
    reach: int
    text: int
    step: int

    @property
    def queries(self) -> int:
        """Queries of one tile."""
        return self.rows * self.columns

    @property
    def keys(self) -> int:
        """Keys of one tile."""
        return self.span * self.reach + self.text

    @property
    def pairs(self) -> int:
        """Pairs that the products span."""
        return self.count * self.queries * self.keys


def tiles(call: Call, grids: Grids, rows: int, columns: int) -> Tiles:
    """All images in tiles of one size."""
    laid = [call.laid(grid) for grid in grids]
    count = sum(-(-height // rows) * -(-width // columns) for height, width in laid)
    # Around a tile that is as high or wide as every image there is nothing.
    above, aside = (
        0 if side >= most else min(call.radius, most - 1)
        for side, most in zip((rows, columns), (max(sides) for sides in zip(*laid)))
    )
    span, reach = rows + above + (0 if call.causal else above), columns + 2 * aside
    text = max(grid.text for grid in grids)
    if (left_over := (span * reach + text) % LANES) > LANES // 4:
        text += LANES - left_over
    chunk = CHUNK if call.device == "cpu" else CHUNK_ON_GPU
    step = max(1, chunk // ((span * reach + text) * call.kv_heads * call.size))
    return Tiles(count, rows, columns, above, span, aside, reach, text, step)
