"""The images of a call, and all else that decides how it is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

METRICS = ("chebyshev", "euclidean", "raster")


@dataclass(frozen=True)
class Grid:
    """One image: tokens `start` on of batch row `row`, in raster order, and the text keys that they see."""

    row: int
    start: int
    height: int
    width: int
    text_start: int
    text_stop: int

    @property
    def tokens(self) -> int:
        """Visual tokens of the image."""
        return self.height * self.width

    @property
    def text(self) -> int:
        """Text keys that each of them sees."""
        return self.text_stop - self.text_start


Grids = tuple[Grid, ...]


def read_grids(rows: Sequence[Sequence[int]], tokens: int) -> Grids | None:
    """The images of the op's `grids`, or None where it promises nothing (see `foveate.ops.neighbor_attention`)."""
    grids = tuple(Grid(*row) for row in rows)
    in_row: dict[int, int] = {}
    for grid in grids:
        in_row[grid.row] = in_row.get(grid.row, 0) + grid.tokens
    if not tokens or max(in_row.values(), default=0) != tokens:
        return None
    return tuple(grid for grid in grids if grid.tokens)


@dataclass(frozen=True)
class Call:
    """One call in integers; `device` is a type such as "cpu", `text` counts text keys, `size` is a head's."""

    device: str
    dtype: torch.dtype
    batch: int
    heads: int
    kv_heads: int
    size: int
    tokens: int
    text: int
    radius: int
    metric: str
    causal: bool

    def laid(self, grid: Grid) -> tuple[int, int]:
        """Height and width as the forms see them: a single row, or any image where only order counts, is one column."""
        return (grid.tokens, 1) if self.metric == "raster" or grid.height == 1 else (grid.height, grid.width)

    def filled(self, grids: Grids | None) -> bool:
        """Is every token of an image? Tokens behind the last image of their batch row are padding."""
        return grids is None or sum(grid.tokens for grid in grids) == self.batch * self.tokens

    def covers(self, grid: Grid) -> bool:
        """Is every token of the image near enough to every other?"""
        height, width = self.laid(grid)
        if self.metric == "euclidean":
            return (height - 1) ** 2 + (width - 1) ** 2 <= self.radius**2
        return max(height, width) - 1 <= self.radius
