"""The one interface of backends: a graph of a program in, something callable out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor, fx

from foveate.errors import BackendError
from foveate.ir.join import join
from foveate.ir.program import Program

Inputs = Mapping[str, Tensor | int]
Runner = Callable[[Inputs], dict[str, Any]]
"""Takes a graph's inputs by name (names it does not know are ignored) and returns its outputs by name."""

BACKENDS: dict[str, str] = {
    "eager": "foveate.backends.eager",
    "inductor": "foveate.backends.inductor",
    "onnx": "foveate.backends.onnx",
    "aoti": "foveate.backends.aoti",
}
"""Backend name -> module with a `lower` function."""


TRAINS = ("eager", "inductor")
"""Backends whose weights may learn: training graphs run eagerly on each of them."""

WHOLE_BUFFERS = ("onnx", "aoti")
"""Backends whose steps read the cache's whole buffers, free room included, which need no copy to be contiguous."""

SPLIT = ("prefill", "train")
"""Graphs in split form, whose streams are joined again where they do the same."""


class Lower(Protocol):
    """What a backend module offers."""

    def __call__(self, program: Program, graph: fx.Graph, name: str) -> Runner:
        """Make a graph runnable; the graph is not changed."""


def lower(program: Program, backend: str) -> dict[str, Runner]:
    """Every graph of a program, runnable; BackendError for a name that is not in `BACKENDS`."""
    return {name: lower_graph(program, backend, name, graph) for name, graph in program.graphs.items()}


def lower_graph(program: Program, backend: str, name: str, graph: fx.Graph) -> Runner:
    """One graph, runnable, after the rewrites that no backend can do without; BackendError as for `lower`."""
    if backend not in BACKENDS:
        raise BackendError(f"backend {backend!r} is not known; there are: {', '.join(BACKENDS)}")
    module = import_module(BACKENDS[backend])
    function: Lower = module.lower
    return function(program, joined_graph(program, name, graph), name)


def joined_graph(program: Program, name: str, graph: fx.Graph) -> fx.Graph:
    """The graph as it runs: streams that do the same are one again."""
    # A CPU's matmuls over a few hundred tokens do not wait for weights, so reading some twice costs less than more ops.
    share = program.weights.device().type != "cpu"
    return join(program, graph, share=share) if name in SPLIT else graph


def input_names(graph: fx.Graph) -> tuple[str, ...]:
    """Names of a graph's inputs, in order."""
    return tuple(str(n.target) for n in graph.nodes if n.op == "placeholder")
