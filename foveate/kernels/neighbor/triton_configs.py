"""Patch and block sizes of the Triton kernels: a static choice, so that nothing is tuned while a model runs.

Every choice is compiled by `benchmarks/triton_resources.py` for the GPUs named there; none spills.
"""

from __future__ import annotations

from typing import NamedTuple


class Config(NamedTuple):
    """A program's patch of rows x cols tokens, its block of tokens on the other side, warps and pipeline stages."""

    rows: int
    cols: int
    block: int
    warps: int
    stages: int


PATCHES = {8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16)}
"""Patch of so many tokens."""


def forward_config(capability: int, group: int, padded: int, bytes_each: int) -> Config:
    """For `group` query heads a key head (a power of two), heads of `padded` elements of so many bytes."""
    if bytes_each == 4 or padded > 128:
        rows, cols = PATCHES[max(64 // group, 8)]
        return Config(rows, cols, 32, 8, 1)
    matrix = 64 if group == 1 else 128
    rows, cols = PATCHES[max(matrix // group, 8)]
    return Config(rows, cols, 64 if padded <= 64 else 32, matrix // 16, 2)
