"""Runs an exported graph on ONNX Runtime for torch tensors, from a package's file or from memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from foveate.backends.base import Inputs, Runner
from foveate.backends.onnx import runtime
from foveate.backends.onnx.names import input_name, named_outputs, rebuilt
from foveate.errors import BackendError


def open_file(path: Path) -> Any:
    """A session of a package's graph, with as many threads as torch has; see `foveate.backends.onnx.runtime`."""
    return runtime.open_file(path, torch.get_num_threads())


def open_memory(model: Any, weights: Mapping[str, Tensor]) -> Any:
    """A session of a model whose external weights are given, by initializer, and not copied."""
    ort = runtime.installed()
    chosen = runtime.options(torch.get_num_threads())
    values = [ort.OrtValue.ortvalue_from_numpy(value.detach().cpu().numpy()) for value in weights.values()]
    chosen.add_external_initializers(list(weights), values)
    try:
        return ort.InferenceSession(model.SerializeToString(), chosen, providers=[runtime.CPU])
    except Exception as error:
        raise BackendError(f"ONNX Runtime does not take this graph: {runtime.first_line(error)}") from None


def runner(session: Any, name: str, graph: fx.Graph) -> Runner:
    """A program's graph as ONNX Runtime runs it: torch tensors in and out, which share their memory with its own.

    For bfloat16, which numpy does not have, the session takes and gives fp32 (`foveate.backends.onnx.checking`).
    """
    taken = {each.name for each in session.get_inputs()}
    given = {str(node.target): input_name(name, str(node.target)) for node in graph.nodes if node.op == "placeholder"}
    wanted = [each.name for each in session.get_outputs()]
    dtypes = {label: node.meta["val"].dtype for label, node in named_outputs(name, graph).items()}

    def run(inputs: Inputs) -> dict[str, Any]:
        feed = {outer: as_array(inputs[inner]) for inner, outer in given.items() if outer in taken}
        found = dict(zip(wanted, session.run(wanted, feed), strict=True))
        return rebuilt(
            name, graph, {label: torch.from_numpy(value).to(dtypes[label]) for label, value in found.items()}
        )

    return run


def as_array(value: Any) -> np.ndarray[Any, Any]:
    """What ONNX Runtime takes for a tensor; it has the tensor's memory, where that is contiguous and a CPU's.

    A tensor of bfloat16 comes as fp32.
    """
    assert isinstance(value, Tensor)  # numbers are no inputs of ONNX graphs
    value = value.detach().cpu().contiguous()
    array: np.ndarray[Any, Any] = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return array
