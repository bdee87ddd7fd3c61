"""Tables that tell the GPU programs of neighbour attention which image, patch or run of tokens is theirs.

They depend on `grids` (see `foveate.ops.neighbor_attention`) alone, so a grid set's tables are made once and kept:
ragged grids, several images and mixed batches then need no padding and no synchronization.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

KEPT = 64
"""Tables of so many (grid set, patch, device) are kept; they are small, and prompts repeat their grids."""


@dataclass(frozen=True)
class Tables:
    """images int32 [images, 8]: batch row, first visual token, height, width, first text key, end of those, 0, 0.

    tiles int32 [tiles, 4]: image, row and column of the patch's corner, 0.
    runs int32 [runs, 4]: image, first token and number of tokens of a run inside the image, 0; by batch row.
    run_rows: (batch row, its first run, end of its runs), for each batch row that has an image.
    text: the end of all text keys that some image sees.
    """

    images: Tensor
    tiles: Tensor
    runs: Tensor
    run_rows: tuple[tuple[int, int, int], ...]
    text: int


def tables(grids: Tensor, rows: int, cols: int, run: int, device: torch.device) -> Tables:
    """The tables of grids int64 [images, 6] on the CPU, for patches of rows x cols tokens and runs of `run` tokens."""
    return _tables(tuple(map(tuple, grids.tolist())), rows, cols, run, device)


@functools.lru_cache(KEPT)
def _tables(grids: tuple[tuple[int, ...], ...], rows: int, cols: int, run: int, device: torch.device) -> Tables:
    images = [[*grid, 0, 0] for grid in grids]
    tiles = [
        [image, top, left, 0]
        for image, (_, _, height, width, _, _) in enumerate(grids)
        for top in range(0, height, rows)
        for left in range(0, width, cols)
    ]
    by_row = sorted(range(len(grids)), key=lambda image: grids[image][0])
    runs: list[list[int]] = []
    bounds: dict[int, tuple[int, int]] = {}
    for image in by_row:
        batch, _, height, width, _, _ = grids[image]
        tokens = height * width
        start = bounds.get(batch, (len(runs),))[0]
        runs += [[image, begin, min(run, tokens - begin), 0] for begin in range(0, tokens, run)]
        bounds[batch] = (start, len(runs))
    return Tables(
        images=_table(images, 8, device),
        tiles=_table(tiles, 4, device),
        runs=_table(runs, 4, device),
        run_rows=tuple((batch, start, stop) for batch, (start, stop) in bounds.items()),
        text=max((stop for *_, start, stop in grids if stop > start), default=0),
    )


def _table(rows: list[list[int]], width: int, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), width).to(device)
