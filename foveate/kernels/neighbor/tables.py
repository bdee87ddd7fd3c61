"""Tables that tell the GPU programs of neighbour attention which image, patch or run of tokens is theirs.

They depend on the images' grids alone, so each is made once and kept for the next layer and the next prompt: ragged
grids, several images and mixed batches then need neither padding nor a synchronization. What is kept is made outside
of inference mode, since the next to need it may be a backward pass.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

Grids = tuple[tuple[int, ...], ...]
"""A row an image, as `foveate.ops.neighbor_attention` says: batch row, first visual token, height, width, first text
key, end of those."""

KEPT = 64
"""So many tables of each kind are kept."""


def grid_rows(grids: Tensor) -> Grids:
    """Grids int64 [images, 6] on the CPU as a key of the tables."""
    return tuple(map(tuple, grids.tolist()))


@functools.lru_cache(KEPT)
def image_table(grids: Grids, device: torch.device) -> Tensor:
    """int32 [images, 8]: the grids' six columns, 0, 0."""
    return _table([[*grid, 0, 0] for grid in grids], 8, device)


@functools.lru_cache(KEPT)
def tile_table(grids: Grids, rows: int, cols: int, device: torch.device) -> Tensor:
    """int32 [tiles, 4], a row a patch of rows x cols tokens: image, row and column of its corner, 0."""
    tiles = [
        [image, top, left, 0]
        for image, (_, _, height, width, _, _) in enumerate(grids)
        for top in range(0, height, rows)
        for left in range(0, width, cols)
    ]
    return _table(tiles, 4, device)


@functools.lru_cache(KEPT)
def run_table(grids: Grids, run: int, device: torch.device) -> tuple[Tensor, dict[int, slice]]:
    """int32 [runs, 4], a row up to `run` tokens of an image: image, first of them, their number, 0.

    Also which runs are those of each batch row that has an image.
    """
    runs: list[list[int]] = []
    of_batch: dict[int, slice] = {}
    for batch in sorted({grid[0] for grid in grids}):
        start = len(runs)
        for image, (row, _, height, width, _, _) in enumerate(grids):
            if row == batch:
                tokens = height * width
                runs += [[image, first, min(run, tokens - first), 0] for first in range(0, tokens, run)]
        of_batch[batch] = slice(start, len(runs))
    return _table(runs, 4, device), of_batch


def text_end(grids: Grids) -> int:
    """The end of all text keys that some image sees; 0 if there are none."""
    return max((stop for *_, start, stop in grids if stop > start), default=0)


@torch.inference_mode(False)
def _table(rows: list[list[int]], width: int, device: torch.device) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(len(rows), width).to(device)
