"""The library that all `foveate::` ops belong to, and the constants of their shapes."""

from collections.abc import Callable
from typing import TypeVar

import torch

F = TypeVar("F", bound=Callable[..., object])

PAD = torch.iinfo(torch.int64).max
"""Order of a token that is only padding: it comes after everything, so no real query sees it."""

FEW_QUERIES = 8
"""Up to so many queries attention is plain matmuls over all keys."""

BLOCK = 256
"""Longer attention runs in blocks of so many queries, each of which reads the keys up to its last query."""

LIBRARY = torch.library.Library("foveate", "DEF")


def fake(name: str) -> Callable[[F], F]:
    """Register what an op returns for tensors without values."""
    register: Callable[[F], F] = torch.library.register_fake(f"foveate::{name}", lib=LIBRARY)
    return register
