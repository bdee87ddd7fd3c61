"""Compile a graph with `torch.compile`; sizes stay dynamic, attention stays one call."""

from __future__ import annotations

import torch
from torch import fx
from torch._inductor.exc import InductorError, InvalidCxxCompiler

from foveate.backends.base import Inputs, Runner, input_names
from foveate.backends.eager import graph_module
from foveate.errors import BackendError
from foveate.ir.program import Program


def lower(program: Program, graph: fx.Graph, name: str) -> Runner:
    """See `foveate.backends.base.Lower`; compilation happens at the first call."""
    module = torch.compile(graph_module(program, graph, name), dynamic=True, fullgraph=True)
    names = input_names(graph)

    def run(inputs: Inputs) -> dict[str, object]:
        try:
            result: dict[str, object] = module(*(inputs[n] for n in names))
        except InductorError as error:
            if isinstance(error.inner_exception, InvalidCxxCompiler):
                raise BackendError(
                    "the inductor backend needs a C++ compiler (g++ or clang++) on this machine"
                ) from None
            raise
        return result

    return run
