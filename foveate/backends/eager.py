"""Run a graph op by op with torch."""

from __future__ import annotations

from torch import fx

import foveate.kernels  # noqa: F401  registers what the foveate ops compute
from foveate.backends.adapters import with_adapters
from foveate.backends.base import Inputs, Runner, input_names
from foveate.backends.fused import fuse
from foveate.ir.program import Program
from foveate.ir.tokens import ELEMENTWISE
from foveate.ir.weights import aten
from foveate.kernels.linear import linear, pays


def graph_module(program: Program, graph: fx.Graph, name: str) -> fx.GraphModule:
    """A module that shares the program's weights and their adapters; what it returns is what the graph returns."""
    root, graph = with_adapters(program, graph)
    fuse(graph)
    linears = [n for n in graph.nodes if n.target == aten.linear.default] if pays() else []
    for node in linears:
        node.kwargs = {**node.kwargs, "ordered": not _feeds_linears(node, linears)}
    for node in linears:
        node.target = linear
    return fx.GraphModule(root, graph, class_name=f"Foveate{name.capitalize()}")


def _feeds_linears(node: fx.Node, linears: list[fx.Node]) -> bool:
    """Whether a value is used by linears only, at most elementwise ops between, so that any order in memory will do."""
    return all(u in linears or (u.target in ELEMENTWISE and _feeds_linears(u, linears)) for u in node.users)


def lower(program: Program, graph: fx.Graph, name: str) -> Runner:
    """See `foveate.backends.base.Lower`."""
    module = graph_module(program, graph, name)
    names = input_names(graph)

    def run(inputs: Inputs) -> dict[str, object]:
        result: dict[str, object] = module(*(inputs[n] for n in names))
        return result

    return run
