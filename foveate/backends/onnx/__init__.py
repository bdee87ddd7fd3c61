"""ONNX: a program's graphs in standard operators, for ONNX Runtime and whatever else reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx

    from foveate.backends.base import Runner
    from foveate.ir.program import Program

__all__ = ["lower"]


def lower(program: Program, graph: fx.Graph, name: str) -> Runner:
    """See `foveate.backends.base.Lower`."""
    # Imported here, because `runtime` of this package serves where there is no torch.
    from foveate.backends.onnx.lowering import lower as lower_graph

    return lower_graph(program, graph, name)
