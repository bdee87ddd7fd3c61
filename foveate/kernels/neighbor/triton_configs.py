"""Patch and block sizes of the Triton kernels: a static choice, so that nothing is tuned while a model runs.

Chosen by arithmetic and by what compiles without spills for compute capabilities 8.0, 9.0 and 10.0
(`benchmarks/triton_resources.py`); the same sizes suit all three.
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


PATCHES = {2: (1, 2), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8)}
"""Patch of so many tokens."""


def forward_config(group: int, radius: int, element_size: int) -> Config:
    """For `group` query heads a key head, a power of two up to 16, of elements of so many bytes."""
    if element_size == 4:
        return Config(*PATCHES[32 // group], block=32, warps=8, stages=2)
    # 64 rows fill a matrix instruction. A large radius makes the halos of 2 x 4 patches wasteful.
    tokens = min(max(64 // group, 8 if radius <= 2 else 16), 128 // group)
    return Config(*PATCHES[tokens], block=32, warps=tokens * group // 16, stages=3)


class BackwardConfigs(NamedTuple):
    """Sizes of the three backward kernels; text keys come in blocks of `text.rows`."""

    dq: Config
    dkv: Config
    text: Config


def backward_configs(group: int, element_size: int) -> BackwardConfigs:
    """For `group` query heads a key head, a power of two up to 16, of elements of so many bytes."""
    if element_size == 4:
        patch = PATCHES[32 // group]
        return BackwardConfigs(Config(*patch, 32, 8, 1), Config(4, 4, 32, 8, 1), Config(16, 1, 32, 8, 1))
    tokens = max(64 // group, 8)
    dq = Config(*PATCHES[tokens], block=32, warps=tokens * group // 16, stages=2)
    return BackwardConfigs(dq, Config(8, 8, 32, 4, 2), Config(64, 1, 32, 4, 2))


MOST_PROGRAMS = 512
"""The text's gradients are made by about so many programs, each of which writes a share."""


def text_run(tokens: int, key_heads: int) -> int:
    """How many of all images' tokens go to one program that makes a share of the text's gradients."""
    return max(256, -(-tokens * key_heads // MOST_PROGRAMS))
