"""The backend `aoti`: regions compiled once for this machine, then opened from the user's cache.

Warm starts need no compiler: a region is found by its text, checked, and opened as a shared library.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

import foveate.kernels  # noqa: F401  registers what the foveate ops compute, for which compiled code asks
from foveate import __version__
from foveate.backends.adapters import adapter_layers
from foveate.backends.aoti.compiling import OPTIONS, as_length, compile_region, from_length, text_of
from foveate.backends.aoti.inputs import check_inputs
from foveate.backends.aoti.store import Store, cache_folder
from foveate.backends.base import Inputs, Runner, joined_graph
from foveate.backends.regions import Compiled, Region, run_by_regions
from foveate.errors import BackendError, FoveateWarning
from foveate.ir.program import Program
from foveate.kernels.linear import pays
from foveate.kernels.processor import cpu_flags, cpu_name

ALIKE = 4
"""So many equal layers have code of their own: compiling it takes as long as compiling a few layers more elsewhere."""


@dataclass(frozen=True)
class Built:
    """What compiling a program took: regions it has, how many of them were compiled now, and in how many seconds.

    cache: the folder where they lie; bytes: of their native code, which holds no weights; open_s: seconds to open all
    of them, hashes checked.
    """

    cache: Path
    regions: int
    compiled: int
    compile_s: float
    open_s: float
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.compiled} of {self.regions} regions compiled in {self.compile_s:.1f} s, the others were there; all "
            f"opened in {self.open_s:.2f} s: {self.bytes / 2**20:.1f} MiB of native code in {self.cache}, for this "
            "user and machine"
        )

    def to_json(self) -> dict[str, Any]:
        """As the command prints it."""
        return {**self.__dict__, "cache": str(self.cache)}


def lower(program: Program, graph: fx.Graph, name: str) -> Runner:
    """See `foveate.backends.base.Lower`; what was not compiled before is compiled now."""
    return Opener(program).runner(graph, name)


def build(program: Program) -> tuple[dict[str, Runner], Built]:
    """Every graph of a program, runnable, and what it took to compile them."""
    opener = Opener(program)
    return opener.runners(), opener.built()


def open_saved(program: Program, folder: Path, torch_version: str) -> dict[str, Runner]:
    """Every graph of a program that was exported to `folder` for this backend, by that version of torch.

    A FoveateWarning says so where its code is not there and is compiled again.
    """
    cache = cache_folder()
    before = f" (it was exported with torch {torch_version})" if torch_version != torch.__version__ else ""
    absent = (
        f"{folder}: {cache} holds no code compiled for it by torch {torch.__version__} and foveate {__version__} on "
        f"this CPU{before}, so it is compiled now, which takes a minute or more"
    )
    return Opener(program, absent).runners()


class Opener:
    """Opens the regions of a program, and compiles those that are not there; absent: a warning in that case."""

    def __init__(self, program: Program, absent: str = "") -> None:
        if adapter_layers(program):
            raise BackendError(
                "the aoti backend runs no adapters: merge them first (peft_model.merge_and_unload()), or run them "
                "eagerly"
            )
        if program.weights.device().type != "cpu":
            raise BackendError(
                f"the aoti backend runs on CPUs, and this model is on {program.weights.device()}: use the inductor "
                "backend there"
            )
        self.program, self.absent = program, absent
        self.store = Store(cache_folder())
        self.opened: dict[str, tuple[Path, Any]] = {}
        self.compiled, self.compile_s, self.open_s = 0, 0.0, 0.0
        self.unsaid = ""  # what is compiled, until it has been said

    def runners(self) -> dict[str, Runner]:
        """A runner for each graph."""
        graphs = self.program.graphs
        return {name: self.runner(joined_graph(self.program, name, graph), name) for name, graph in graphs.items()}

    def runner(self, graph: fx.Graph, name: str) -> Runner:
        """A runner for one graph, as `joined_graph` gives it; a line on stderr says so where it is compiled."""
        self.unsaid = f"the {name} graph"
        run = run_by_regions(self.program, graph, self._function, ALIKE)
        check = check_inputs(graph)

        def checked(inputs: Inputs) -> dict[str, Any]:
            check(inputs)
            with torch.no_grad():
                return run(inputs)

        return checked

    def built(self) -> Built:
        """What it took so far."""
        size = sum(code.stat().st_size for code, _ in self.opened.values())
        count = len(self.opened)
        return Built(self.store.folder, count, self.compiled, self.compile_s, self.open_s, size)

    def _function(self, region: Region) -> Compiled:
        key = key_of(region)
        if key not in self.opened:
            self.opened[key] = self._open(key, region)
        library = self.opened[key][1]
        whole = [not isinstance(node.meta["val"], Tensor) for node in region.results]

        def run(*values: Any) -> tuple[Any, ...]:
            # Code is compiled for values that lie in memory one behind the other.
            given = [as_length(x) if isinstance(x, int) else x.contiguous() for x in values]
            found = library.run(given)
            return tuple(from_length(x) if is_whole else x for x, is_whole in zip(found, whole, strict=True))

        return run

    def _open(self, key: str, region: Region) -> tuple[Path, Any]:
        begun = time.perf_counter()
        code = self.store.find(key)
        if code is None:
            if self.absent:
                warnings.warn(self.absent, FoveateWarning, stacklevel=2)
                self.absent = ""
            if self.unsaid:
                sys.stderr.write(
                    f"foveate: AOTInductor compiles {self.unsaid}, which may take minutes, this once: it is kept in "
                    f"{self.store.folder}\n"
                )
                self.unsaid = ""
            code = self.store.add(key, lambda work: compile_region(region, work, self.store.scratch))
            self.compiled += 1
            self.compile_s += time.perf_counter() - begun
            begun = time.perf_counter()
        try:
            library = torch._C._aoti.AOTIModelContainerRunnerCpu(str(code), 1)
        except RuntimeError as error:
            raise BackendError(f"{code} cannot be opened: {str(error).splitlines()[0]}") from None
        self.open_s += time.perf_counter() - begun
        return code, library


def key_of(region: Region) -> str:
    """The name of a region's entry: a hash of its text, and of all else that its code depends on."""
    made = {"region": text_of(region), **environment()}
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32]


def environment() -> dict[str, Any]:
    """What compiled code depends on besides the region: versions, the processor, and how it is compiled."""
    return {
        "foveate": __version__,
        "torch": str(torch.__version__),
        "cpu": [cpu_name(), cpu_flags(), torch.backends.cpu.get_cpu_capability()],
        "onednn": pays(),
        "options": OPTIONS,
    }
