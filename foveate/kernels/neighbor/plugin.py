"""Neighbour attention compiled ahead of time, as PTX that a TensorRT plugin hands over when an engine is built.

Importing this module does not import Triton, compiling does. No GPU is needed for either.
"""

from __future__ import annotations

import importlib.util
import math
import re
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.errors import BackendError
from foveate.kernels.neighbor.offline import SHARED_LIMIT, compiled
from foveate.kernels.neighbor.triton_configs import Config, forward_config
from foveate.kernels.neighbor.triton_problem import Launch, Problem
from foveate.kernels.neighbor.triton_support import supports

PTX_VERSION = {80: 84, 90: 84, 100: 86}
"""Ten times the PTX version, by ten times the compute capability: as old as can be, since TensorRT brings a compiler
of its own, which may be older than Triton's."""

PARAMETERS = 9
"""Six inputs, two lengths and the output."""


@dataclass(frozen=True)
class Compiled:
    """PTX and how its entry is launched: with 32 * `warps` threads and `shared` bytes of dynamic shared memory.

    The grid is (images * `tiles`, key heads). The entry takes what `triton_plugin.plugin_forward` says.
    """

    entry: str
    ptx: str
    warps: int
    shared: int
    tiles: int


@dataclass(frozen=True)
class PluginKernel:
    """What a model fixes of neighbour attention over images that all have height x width tokens.

    dtype: float32, float16 or bfloat16. Without text the entry's text pointers are not read.
    """

    heads: int
    key_heads: int
    size: int
    height: int
    width: int
    radius: int
    euclidean: bool
    causal: bool
    text: bool
    dtype: str
    scale: float

    @property
    def name(self) -> str:
        """An identifier in C, another one for every other kernel."""
        shape = f"h{self.heads}_k{self.key_heads}_e{self.size}_{self.height}x{self.width}_r{self.radius}"
        flags = {"euclidean": self.euclidean, "causal": self.causal, "text": self.text}
        words = [shape, *(flag for flag, there in flags.items() if there), self.dtype]
        return "_".join(["neighbor_attention", *words, struct.pack(">d", self.scale).hex()])

    @property
    def config(self) -> Config:
        """Sizes of its patches and blocks."""
        problem = self._problem()
        return forward_config(problem.packed, self.radius, problem.q.element_size())

    @property
    def tiles(self) -> int:
        """Patches of an image."""
        config = self.config
        return math.ceil(self.height / config.rows) * math.ceil(self.width / config.cols)

    @property
    def constants(self) -> dict[str, Any]:
        """Compile-time constants of `triton_plugin.plugin_forward`."""
        problem, config = self._problem(), self.config
        return {
            "height": self.height,
            "width": self.width,
            "radius": problem.reach(),
            "scale": self.scale * math.log2(math.e),
            "heads": self.heads,
            "packed": problem.packed,
            "text": self.text,
            **problem.constants(config),
            **problem.geometry(config),
        }

    def refused(self) -> str | None:
        """Why there is no such kernel, or None."""
        problem = self._problem()
        return supports(problem.q, problem.k, None, torch.tensor(problem.grids), problem.metric)

    def launch(self) -> Launch:
        """The kernel over one image without memory: to be compiled, not run."""
        if (reason := self.refused()) is not None:
            raise BackendError(f"neighbour attention does not compile as a plugin: {reason}")
        problem = self._problem()
        q, k = problem.q, problem.k
        if importlib.util.find_spec("triton") is None:
            raise BackendError(
                "neighbour attention as a plugin is compiled by Triton, which is not installed: pip install triton"
            )
        from foveate.kernels.neighbor.triton_plugin import plugin_forward

        images = torch.empty(1, 8, dtype=torch.int32, device="meta")
        arguments = {"q": q, "k": k, "v": k, "text_k": k, "text_v": k, "images": images, "tokens": q.shape[2]}
        arguments |= {"text_tokens": 0, "o": q}
        return Launch(plugin_forward, (self.tiles, self.key_heads), arguments, self.constants, self.config)

    def ptx(self, capability: int) -> Compiled:
        """Compile it for GPUs of this compute capability (times ten)."""
        if capability not in PTX_VERSION:
            taken = ", ".join(map(str, PTX_VERSION))
            raise BackendError(f"neighbour attention compiles for compute capabilities {taken}, not for {capability}")
        launch = self.launch()
        from triton import knobs

        with knobs.compilation.scope():
            knobs.compilation.disable_line_info = True  # it names files of this machine
            made = compiled(launch, capability, ptx_version=PTX_VERSION[capability])
        shared, limit = made.metadata.shared, SHARED_LIMIT[capability]
        if shared > limit:
            raise BackendError(f"{self.name} needs {shared} bytes of shared memory, {limit} is the limit")
        return Compiled(made.name, _own_parameters(made.asm["ptx"]), made.metadata.num_warps, shared, self.tiles)

    def _problem(self) -> Problem:
        """One image without memory, so that constants are made as for any other call."""

        def stream(heads: int) -> Tensor:
            shape = (1, heads, self.height * self.width, self.size)
            return torch.empty(shape, dtype=getattr(torch, self.dtype), device="meta")

        q, k = stream(self.heads), stream(self.key_heads)
        grids = ((0, 0, self.height, self.width, 0, 0),)
        metric = "euclidean" if self.euclidean else "chebyshev"
        return Problem(q, k, k, None, None, grids, self.radius, metric, self.causal, self.scale)


def _own_parameters(ptx: str) -> str:
    """The code without Triton's own parameters, pointers to scratch memory that it does not read: nobody gives them."""
    entry = re.search(r"\.entry\s+\w+\s*\((.*?)\n\)", ptx, re.DOTALL)
    assert entry is not None
    given = entry[1].split(",")
    extra = [re.split(r"\s", each.strip())[-1] for each in given[PARAMETERS:]]
    read = [name for name in extra if re.search(rf"\b{name}\b", ptx[entry.end() :])]
    if read:
        raise BackendError(f"this version of Triton wants scratch memory ({', '.join(read)}), which no plugin can give")
    return ptx[: entry.start(1)] + ",".join(given[:PARAMETERS]) + ptx[entry.end(1) :]
