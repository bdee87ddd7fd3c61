"""Mixed precision: under `torch.autocast` the attention ops take all of their values in autocast's type.

Rotary embeddings leave queries and keys in float32 where values, straight from a projection, are already narrower;
torch casts the inputs of its own attention in the same way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from foveate.ops import LIBRARY


def follow_autocast(name: str) -> None:
    """Let `foveate::name` cast its floating-point arguments on the CPU and on CUDA while autocast is on."""
    op = getattr(torch.ops.foveate, name).default
    for device in ("cpu", "cuda"):

        def cast(*args: Any, device: str = device) -> Any:
            dtype = torch.get_autocast_dtype(device)
            with torch.autocast(device, enabled=False):
                return op(*tree_map(lambda x: x.to(dtype) if _is_value(x) else x, args))

        LIBRARY.impl(name, cast, f"Autocast{device.upper()}")


def _is_value(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()
