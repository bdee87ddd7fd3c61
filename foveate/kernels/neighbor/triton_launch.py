"""How the Triton kernels of neighbour attention are launched.

Importing this module does not import Triton, building a launch does. A launch is data: it can be run, or compiled
for a GPU that is not there, so what is checked is what runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveate.kernels.neighbor.tables import Tables, tables
from foveate.kernels.neighbor.triton_configs import Config, forward_config
from foveate.kernels.neighbor.triton_support import LONGEST_SIDE, capability


class Stream(NamedTuple):
    """A [B, H, n, e] tensor as kernels see it: its address and its strides in elements; e is contiguous."""

    base: Tensor
    batch: int
    head: int
    token: int


@dataclass(frozen=True)
class Launch:
    """A kernel with all it is called with."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    config: Config

    def run(self) -> None:
        """Put it on the current stream of its tensors' device."""
        if 0 in self.grid:
            return
        options = {"num_warps": self.config.warps, "num_stages": self.config.stages}
        with torch.cuda.device_of(self.arguments["q"].base):
            self.kernel[self.grid](**self.arguments, **self.constants, **options)


@dataclass(frozen=True)
class Problem:
    """Inputs that `triton_support.supports` takes, with `grids` that hold.

    q [B, H, n, e], k, v [B, Hk, n, e], text_k, text_v [B, Hk, m, e] or both None; any strides.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    text_k: Tensor | None
    text_v: Tensor | None
    grids: Tensor
    radius: int
    metric: str
    causal: bool
    scale: float

    @property
    def group(self) -> int:
        """Query heads of one key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def padded(self) -> int:
        """Head size in memory of a program: a power of two."""
        return _power_of_two(self.q.shape[3])

    def tables(self, config: Config, run: int = 0) -> Tables:
        """Tables on the device of q, for the patches of a config and runs of so many tokens."""
        return tables(self.grids, config.rows, config.cols, run or self.q.shape[2], self.q.device)

    def streams(self) -> dict[str, Stream]:
        """What kernels read; the visual keys stand in for text that is not there."""
        text_k, text_v = (self.k, self.v) if self.text_k is None or self.text_v is None else (self.text_k, self.text_v)
        named = {"q": self.q, "k": self.k, "v": self.v, "text_k": text_k, "text_v": text_v}
        return {name: stream(x) for name, x in named.items()}

    def scalars(self) -> dict[str, Any]:
        """Arguments of every kernel that are numbers; beyond the longest diagonal a radius changes nothing."""
        return {"tokens": self.q.shape[2], "radius": min(self.radius, 2 * LONGEST_SIDE - 1)}

    def constants(self, config: Config) -> dict[str, Any]:
        """Compile-time constants of every kernel."""
        return {
            "group": self.group,
            "size": self.q.shape[3],
            "padded": self.padded,
            "rows": config.rows,
            "cols": config.cols,
            "block": config.block,
            "euclidean": self.metric == "euclidean",
            "causal": self.causal,
            # Three TF32 products are as exact as fp32 and, unlike it, have a matrix instruction.
            "precision": "tf32x3" if self.q.dtype == torch.float32 else "tf32",
        }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    text_k: Tensor | None,
    text_v: Tensor | None,
    grids: Tensor,
    radius: int,
    metric: str,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output [B, n, H, e] and, fp32 [B, H, n], the logarithm of each row's sum of exponentials; see `Problem`.

    Both are 0 where a token is padding.
    """
    problem = Problem(q, k, v, text_k, text_v, grids, radius, metric, causal, scale)
    batch, heads, tokens, size = q.shape
    o = q.new_empty(batch, tokens, heads, size)
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    forward_launch(problem, o, lse, capability(q.device)).run()
    clear_padding(grids, o.transpose(1, 2), lse[..., None])
    return o, lse


def forward_launch(problem: Problem, o: Tensor, lse: Tensor, capability: int) -> Launch:
    """The launch that fills o [B, n, H, e] and lse [B, H, n] of every image's tokens."""
    from foveate.kernels.neighbor.triton_forward import neighbor_forward

    packed = _power_of_two(problem.group)
    config = forward_config(capability, packed, problem.padded, problem.q.element_size())
    used = problem.tables(config)
    return Launch(
        neighbor_forward,
        (len(used.tiles), problem.k.shape[1]),
        {
            **problem.streams(),
            "o": stream(o.transpose(1, 2)),
            "lse": lse,
            "images": used.images,
            "tiles": used.tiles,
            **problem.scalars(),
            "scale": problem.scale * math.log2(math.e),
        },
        {**problem.constants(config), "packed": packed, "text": problem.text_k is not None and used.text > 0},
        config,
    )


def clear_padding(grids: Tensor, *streams: Tensor) -> None:
    """Set every [B, H, n, ...] stream to 0 behind the images of each batch row."""
    batch, _, tokens = streams[0].shape[:3]
    ends = [0] * batch
    for row, first, height, width, _, _ in grids.tolist():
        ends[row] = max(ends[row], first + height * width)
    for row, end in enumerate(ends):
        if end < tokens:
            for x in streams:
                x[row, :, end:] = 0


def stream(x: Tensor) -> Stream:
    """x [B, H, n, e] for a kernel; copied when e is not contiguous."""
    x = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
    return Stream(x, *x.stride()[:3])


def _power_of_two(count: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (count - 1).bit_length()
