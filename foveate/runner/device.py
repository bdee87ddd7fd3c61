"""Writing into buffers that numpy cannot reach: a small graph, whose outputs are bound to the memory of its inputs.

    new [B, Hk, T, e]   at [1, 1, T, 1] --Expand-->  ScatterElements(buffer, at, new)  ->  the same buffer

ONNX Runtime's ScatterElements copies the buffer first only where its output is other memory, so a step moves its own
keys and values and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foveate.backends.onnx.runtime import installed
from foveate.errors import BackendError
from foveate.runner.cache import TOKENS
from foveate.runner.sessions import Device, Value

OPSET = 13
IR_VERSION = 8


class GraphWriter:
    """A `foveate.runner.cache.Writer` for any device. names: of the buffers; half: whether they are of fp16."""

    def __init__(self, device: Device, names: Sequence[str], half: bool) -> None:
        """Raises BackendError where the onnx package, which makes the graph, is not installed."""
        self.device, self.names = device, list(names)
        options = installed().SessionOptions()
        options.log_severity_level = 3
        model = _model(self.names, half)
        self.session = installed().InferenceSession(model, options, providers=device.providers)

    def write(self, buffers: Mapping[str, Value], new: Mapping[str, Value], start: int) -> None:
        """See `foveate.runner.cache.Writer`."""
        if not new:
            return
        bound = self.session.io_binding()
        tokens = new[self.names[0]].shape[TOKENS]
        at = self.device.put(np.arange(start, start + tokens, dtype=np.int64)[None, None, :, None])
        bound.bind_ortvalue_input("at", at.held)
        for name in self.names:
            bound.bind_ortvalue_input(name, buffers[name].held)
            bound.bind_ortvalue_input(f"new.{name}", new[name].held)
            bound.bind_ortvalue_output(f"written.{name}", buffers[name].held)
        self.session.run_with_iobinding(bound)


def _model(names: Sequence[str], half: bool) -> bytes:
    try:
        from onnx import TensorProto, helper
    except ImportError:
        raise BackendError("keeping the cache on a GPU needs the onnx package: pip install onnx") from None
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    nodes, inputs, outputs = [], [helper.make_tensor_value_info("at", TensorProto.INT64, [1, 1, "T", 1])], []

    def described(name: str) -> Any:
        return helper.make_tensor_value_info(name, kind, [None] * 4)

    for name in names:
        nodes += [
            helper.make_node("Shape", [f"new.{name}"], [f"shape.{name}"]),
            helper.make_node("Expand", ["at", f"shape.{name}"], [f"at.{name}"]),
            helper.make_node("ScatterElements", [name, f"at.{name}", f"new.{name}"], [f"written.{name}"], axis=TOKENS),
        ]
        inputs += [described(name), described(f"new.{name}")]
        outputs.append(described(f"written.{name}"))
    graph = helper.make_graph(nodes, "write", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    written: bytes = model.SerializeToString()
    return written
