"""Memory that a kernel needs during one call, kept by each thread for the next.

What malloc has got from the system for a large tensor it soon gives back, and every 4 KiB that are taken anew cost a
page fault: for 6 MiB they took longer than filling them did.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = 2**27
"""Bytes up to which memory is kept; what is larger is made for each call."""

_KEPT = threading.local()


def scratch(name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialized tensor of like's dtype, on the CPU; this thread's next call with the same name overwrites it."""
    bytes_ = math.prod(shape) * like.element_size()
    if bytes_ > LARGEST:
        return like.new_empty(shape)
    kept: Tensor | None = getattr(_KEPT, name, None)
    if kept is None or len(kept) < bytes_:
        # Made outside of inference mode, since the next call may be too.
        with torch.inference_mode(False):
            kept = torch.empty(bytes_, dtype=torch.uint8, device="cpu")
        setattr(_KEPT, name, kept)
    return kept[:bytes_].view(like.dtype).view(shape)
