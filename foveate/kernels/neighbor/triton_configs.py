"""Patch and block sizes of the Triton kernels: a static choice, so that nothing is tuned while a model runs.

Chosen by arithmetic and by what compiles without spills for compute capabilities 8.0, 9.0 and 10.0, with Triton 3.6
and 3.9 (`benchmarks/triton_resources.py`); no time has been measured yet.
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


PATCHES = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8)}
"""Patch of so many tokens."""

ROWS = 64
"""Rows of a matrix instruction of compute capability 9.0; with less of them part of it would stay idle."""


def forward_config(group: int, radius: int, element_size: int) -> Config:
    """For `group` query heads a key head, a power of two up to 16, of elements of so many bytes."""
    if element_size == 4:
        return Config(*PATCHES[16 // group], block=32, warps=8, stages=2)
    # A large radius makes the halos of 2 x 4 patches wasteful.
    tokens = min(max(ROWS // group, 8 if radius <= 2 else 16), 2 * ROWS // group)
    return Config(*PATCHES[tokens], block=32, warps=tokens * group // 16, stages=3)


class BackwardConfigs(NamedTuple):
    """Sizes of the three backward kernels; `text` owns blocks of `rows` text keys."""

    dq: Config
    dkv: Config
    text: Config


def backward_configs(capability: int, group: int, element_size: int) -> BackwardConfigs:
    """For a GPU of this compute capability (times ten); else as `forward_config`."""
    if element_size == 4:
        narrow = {"block": 32, "warps": 8, "stages": 2}
        return BackwardConfigs(Config(*PATCHES[16 // group], **narrow), Config(4, 4, **narrow), Config(16, 1, **narrow))
    # From 10.0 on results of matrix instructions lie in a memory of their own, and four warps have registers enough.
    warps = 8 if capability < 100 else 4
    tokens = max(ROWS // group, 8)
    return BackwardConfigs(
        dq=Config(*PATCHES[tokens], block=32, warps=warps, stages=2),
        dkv=Config(8, 8, block=32, warps=warps, stages=2),
        text=Config(64, 1, block=32, warps=warps, stages=2),
    )


MOST_PROGRAMS = 512
"""The text's gradients are made by about so many programs, each of which writes a share."""


def text_run(tokens: int, key_heads: int) -> int:
    """How many of all images' tokens go to one program that makes a share of the text's gradients."""
    return max(256, -(-tokens * key_heads // MOST_PROGRAMS))
