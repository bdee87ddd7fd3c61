"""A call of neighbour attention as the Triton kernels take it. Imports no Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.kernels.neighbor.tables import Grids
from foveate.kernels.neighbor.triton_configs import Config
from foveate.kernels.neighbor.triton_support import LONGEST_SIDE


class Stream(NamedTuple):
    """A tensor as kernels see it: its address and the strides, in elements, of batch row (or share), head and token."""

    base: Tensor
    batch: int
    head: int
    token: int


@dataclass(frozen=True)
class Launch:
    """A kernel with all it is called with: data, so it can be run, or compiled for a GPU that is not there."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    config: Config

    @property
    def options(self) -> dict[str, Any]:
        """What the compiler is told; multiply-adds are fused whatever the Triton version's default."""
        return {"num_warps": self.config.warps, "num_stages": self.config.stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Put it on the current stream of its tensors' device."""
        if 0 in self.grid:
            return
        with torch.cuda.device_of(self.arguments["q"].base):
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


@dataclass(frozen=True)
class Problem:
    """Inputs that `triton_support.supports` takes, with grids that hold.

    q [B, H, n, e], k, v [B, Hk, n, e], text_k, text_v [B, Hk, m, e] or both None; any strides.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    text_k: Tensor | None
    text_v: Tensor | None
    grids: Grids
    radius: int
    metric: str
    causal: bool
    scale: float

    @property
    def group(self) -> int:
        """Query heads of one key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def packed(self) -> int:
        """The same in a program's memory: a power of two."""
        return power_of_two(self.group)

    def reach(self) -> int:
        """The radius; beyond the longest diagonal it changes nothing."""
        return min(self.radius, 2 * LONGEST_SIDE - 1)

    def constants(self, config: Config) -> dict[str, Any]:
        """Compile-time constants that all kernels have."""
        return {
            "group": self.group,
            "size": self.q.shape[3],
            "padded": power_of_two(self.q.shape[3]),
            "block": config.block,
            # Three TF32 products are nearly as exact as fp32 and, unlike it, have a matrix instruction.
            "precision": "tf32x3" if self.q.dtype == torch.float32 else "tf32",
        }

    def geometry(self, config: Config) -> dict[str, Any]:
        """Compile-time constants of kernels that own a patch."""
        euclidean = self.metric == "euclidean"
        return {"rows": config.rows, "cols": config.cols, "euclidean": euclidean, "causal": self.causal}

    def clear_padding(self, *streams: Tensor) -> None:
        """Set every [B, H, n, ...] stream to 0 behind the images of each batch row."""
        batch, _, tokens, _ = self.q.shape
        ends = [0] * batch
        for row, first, height, width, _, _ in self.grids:
            ends[row] = max(ends[row], first + height * width)
        for row, end in enumerate(ends):
            if end < tokens:
                for x in streams:
                    x[row, :, end:] = 0


def stream(x: Tensor) -> Stream:
    """x [B, H, n, e] for a kernel; copied when e is not contiguous."""
    x = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
    return Stream(x, *x.stride()[:3])


def power_of_two(count: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (count - 1).bit_length()
