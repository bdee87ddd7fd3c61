"""How the forms cut a call. Both count the query-key pairs of one head that their products span."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from foveate.neighborhood.grids import Call, Grid, Grids

BLOCK = {"cpu": 64}
"""Queries of one block by device; others launch fewer, larger ones."""

LARGE_BLOCK = 1024

CHUNK = 2**18
"""So many elements of keys are gathered at once: they are used while they are still in the cache."""


@dataclass(frozen=True)
class Block:
    """Queries `start` to `stop` of the rows `batch`, and the ranges of visual and of text keys that they may see.

    `kind`: "causal", each sees the visual keys up to itself; "all", each sees every key; "mask", orders and
    coordinates decide.
    """

    batch: tuple[int, int]
    start: int
    stop: int
    keys: tuple[int, int]
    text: tuple[int, int]
    kind: str

    @property
    def pairs(self) -> int:
        """Pairs that the products span."""
        rows, keys, text = (b - a for a, b in (self.batch, self.keys, self.text))
        return rows * (self.stop - self.start) * (keys + text)


def blocks(call: Call, grids: Grids | None) -> tuple[Block, ...]:
    """The call in blocks of queries; those of an image skip the keys that are too many rows away."""
    size = BLOCK.get(call.device, LARGE_BLOCK)
    if grids is not None:
        return tuple(block for grid in grids for block in _of_image(call, grid, size))
    bounds = [*range(0, call.tokens, size), call.tokens]
    ranges = (0, call.tokens), (0, call.text)
    return tuple(Block((0, call.batch), a, b, *ranges, "mask") for a, b in pairwise(bounds))


def _of_image(call: Call, grid: Grid, size: int) -> Iterator[Block]:
    batch, text = (grid.row, grid.row + 1), (grid.text_start, grid.text_stop)
    begin, end = grid.start, grid.start + grid.tokens
    if call.covers(grid) and not (call.causal and grid.text):
        yield Block(batch, begin, end, (begin, end), text, "causal" if call.causal else "all")
        return
    width = call.laid(grid)[1]
    for a in range(0, grid.tokens, size):
        b = min(a + size, grid.tokens)
        first = max(0, (a // width - call.radius) * width)
        last = b if call.causal else min(grid.tokens, ((b - 1) // width + call.radius + 1) * width)
        yield Block(batch, begin + a, begin + b, (begin + first, begin + last), text, "mask")


@dataclass(frozen=True)
class Tiles:
    """`count` tiles of `rows` x `columns` queries, which see `span` x `reach` keys around them and `text` text keys.

    These keys begin `above` rows over the tile and `aside` columns left of it. `step` tiles are done at once.
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
    above, aside = (min(call.radius, max(sizes) - 1) for sizes in zip(*laid))
    count = sum(-(-height // rows) * -(-width // columns) for height, width in laid)
    span, reach = rows + above + (0 if call.causal else above), columns + 2 * aside
    text = max(grid.text for grid in grids)
    step = max(1, CHUNK // ((span * reach + text) * call.kv_heads * call.size))
    return Tiles(count, rows, columns, above, span, aside, reach, text, step)
