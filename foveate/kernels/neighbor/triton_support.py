"""Which devices and inputs the Triton form of neighbour attention takes; imports no Triton."""

from __future__ import annotations

import functools
import importlib.util
import math
import os

import torch
from torch import Tensor

LONGEST_SIDE = 1024
"""So that no halo has more slots than `triton_shared.halo_place` tells apart."""

MOST_HEADS = 16
"""Most query heads of one key head: they share a program."""

HEAD_SIZES = range(16, 129)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
METRICS = ("chebyshev", "euclidean")


def available(device: torch.device) -> bool:
    """Whether Triton is installed and has a device to run on: a GPU from 8.0 on, or its interpreter."""
    if importlib.util.find_spec("triton") is None:
        return False
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True
    return device.type == "cuda" and torch.version.cuda is not None and capability(device) >= 80


@functools.cache
def capability(device: torch.device) -> int:
    """Ten times the compute capability; without a GPU (the interpreter, the meta device) that of the oldest taken."""
    if device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def supports(q: Tensor, k: Tensor, text_k: Tensor | None, grids: Tensor, metric: str) -> str | None:
    """Why these inputs need another form, or None; q [B, H, n, e], k, text_k [B, Hk, ., e], grids that hold."""
    shared = q.shape[1] // k.shape[1]
    if metric not in METRICS:
        return f"the metric is {metric}, this form takes {' and '.join(METRICS)}"
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}, this form takes {', '.join(map(str, DTYPES))}"
    if shared > MOST_HEADS:
        return f"{shared} query heads share a key head, this form takes up to {MOST_HEADS}"
    if q.shape[3] not in HEAD_SIZES:
        return f"the head size is {q.shape[3]}, this form takes {HEAD_SIZES[0]} to {HEAD_SIZES[-1]}"
    side = int(grids[:, 2:4].max()) if len(grids) else 0
    if side > LONGEST_SIDE:
        return f"an image is {side} tokens long, this form takes up to {LONGEST_SIDE}"
    for name, x in (("q", q), ("k", k), ("the text's k", text_k)):
        if x is not None and _span(x) >= 2**31:
            return f"a batch row of {name} spans {_span(x)} elements, this form takes up to 2**31"
    return None


def _span(x: Tensor) -> int:
    """Elements from the first to the last of a batch row, as it lies in memory or would without gaps."""
    there = sum(stride * (size - 1) for stride, size in zip(x.stride()[1:], x.shape[1:]))
    return max(there, math.prod(x.shape[1:]))
