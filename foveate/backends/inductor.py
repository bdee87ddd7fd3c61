"""Compile a graph with `torch.compile`, layer by layer; sizes stay dynamic, attention stays one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._inductor.exc import InductorError, InvalidCxxCompiler

import foveate.kernels  # noqa: F401  registers what the foveate ops compute
from foveate import ops
from foveate.backends.base import Inputs, Runner
from foveate.backends.regions import Compiled, Region, run_by_regions
from foveate.errors import BackendError
from foveate.ir.program import Program
from foveate.kernels.linear import pays


def lower(program: Program, graph: fx.Graph, name: str) -> Runner:
    """See `foveate.backends.base.Lower`; compilation happens at the first call."""
    for weight in (program.weights.get(str(n.target)) for n in graph.nodes if n.op == "get_attr"):
        # Weights are arguments, but their sizes never change; tokens' do.
        torch._dynamo.mark_static(weight)
    run = run_by_regions(program, graph, _compiled)

    def guarded(inputs: Inputs) -> dict[str, Any]:
        try:
            return run(inputs)
        except InductorError as error:
            if isinstance(error.inner_exception, InvalidCxxCompiler):
                raise BackendError(
                    "the inductor backend needs a C++ compiler (g++ or clang++) on this machine"
                ) from None
            raise

    return guarded


def _compiled(region: Region) -> Compiled:
    for node in region.graph.nodes:
        if node.target == torch.ops.aten.linear.default and pays():
            node.target = ops.linear
    module = fx.GraphModule(torch.nn.Module(), region.graph, class_name="FoveateLayer")
    compiled: Compiled = torch.compile(module, dynamic=True, fullgraph=True)
    return compiled
