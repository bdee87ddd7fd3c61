"""The backend `onnx`: graphs emitted as ONNX and run by ONNX Runtime, from memory or from a package's files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from foveate.backends.adapters import adapter_layers
from foveate.backends.base import Inputs, Runner
from foveate.errors import BackendError
from foveate.ir.program import Program

_ROWS = re.compile(r"(.*)\[(\d+):(\d+)\]")


def lower(program: Program, graph: fx.Graph, name: str) -> Runner:
    """See `foveate.backends.base.Lower`; ONNX Runtime reads the program's own weights, where they lie."""
    _check(program)
    try:
        from foveate.backends.onnx.graphs import build
    except ImportError:
        raise BackendError("the onnx backend needs the onnx package: pip install 'foveate[onnx]'") from None
    from foveate.backends.onnx.emit import Place
    from foveate.backends.onnx.session import open_memory, runner

    # Where a weight would lie in a file: only its length counts, of which a slice of rows is a share.
    places = {key: Place(0, value.numel() * value.element_size()) for key, value in program.weights.items()}
    model = build(program, name, graph, places)
    external = [each.name for each in model.graph.initializer if each.external_data]
    return runner(open_memory(model, {label: _weight(program, label) for label in external}), name, graph)


def open_package(program: Program, folder: Path) -> dict[str, Runner]:
    """A runner for each graph of a program, from the files of the package that it was exported to."""
    from foveate.backends.onnx.names import FILES
    from foveate.backends.onnx.session import open_file, runner

    _check(program)
    return {name: runner(open_file(folder / FILES[name]), name, graph) for name, graph in program.graphs.items()}


Seen = dict[str, tuple[dict[str, Any], dict[str, Any]]]
"""Graph -> the arrays that it was last given, and those that it answered, by their names in a package."""


def recorded(program: Program, runners: Mapping[str, Runner], seen: Seen) -> dict[str, Runner]:
    """The same runners, of any backend, which keep in `seen` what each was last asked and what it answered."""
    from foveate.backends.onnx.names import input_name, named_values
    from foveate.backends.onnx.session import as_array

    def keeping(name: str, graph: fx.Graph) -> Runner:
        given = [str(n.target) for n in graph.nodes if n.op == "placeholder" and isinstance(n.meta["val"], Tensor)]

        def run(inputs: Inputs) -> dict[str, Any]:
            # Copies: a cache may grow within the memory of what was given.
            asked = {input_name(name, inner): as_array(inputs[inner]).copy() for inner in given}
            returned = runners[name](inputs)
            seen[name] = asked, {n: as_array(v).copy() for n, v in named_values(name, graph, returned).items()}
            return returned

        return run

    return {name: keeping(name, graph) for name, graph in program.graphs.items()}


def _check(program: Program) -> None:
    if adapter_layers(program):
        raise BackendError(
            "the onnx backend runs no adapters: merge them first (peft_model.merge_and_unload()), or run them eagerly"
        )
    if program.dtype == torch.bfloat16:
        raise BackendError(
            "the onnx backend runs no bfloat16, for which ONNX Runtime's CPU has few kernels and numpy no type: take "
            "float16 or float32, or backend eager; exporting works"
        )


def _weight(program: Program, label: str) -> Tensor:
    """The tensor that an initializer stands for, of which it may be some rows."""
    found = _ROWS.fullmatch(label)
    if found is None:
        return program.weights.get(label)
    name, start, stop = found.groups()
    return program.weights.get(name)[int(start) : int(stop)]
