"""Whether ONNX Runtime does what eager does: of a whole model on several prompts, and of one op alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnxruntime
import torch
from onnx import helper
from torch import Tensor, fx, nn

import foveate
from foveate.backends.onnx.emit import ELEMENT, Emitter
from foveate.backends.onnx.graphs import WRITERS
from foveate.backends.onnx.opsets import IR_VERSIONS, OPSET
from foveate.models.random import random_inputs

PROMPTS: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {"batch": 2},
    "left": {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"},
    "no image": {"images": 0},
    "right": {"batch": 3, "images_per_row": [1, 2, 1], "padding": "right", "prefix": 0},
}


def assert_agrees(model: nn.Module, traced: Any, passes: str) -> None:
    """Logits within 1e-5, the same tokens kept and held, and the same answers, on every prompt."""
    eager, onnx = (foveate.optimize(model, passes, traced=traced, backend=name) for name in ("eager", "onnx"))
    for name, sizes in PROMPTS.items():
        inputs = random_inputs(model, **sizes)
        with torch.inference_mode():
            a, b = eager(**inputs), onnx(**inputs)
            answers = [each.generate(**inputs, max_new_tokens=6, do_sample=False) for each in (eager, onnx)]
        assert (a.logits - b.logits).abs().max() <= 1e-5, name
        for one, other in ((a.kept or {}, b.kept or {}), (a.held or {}, b.held or {})):
            assert one.keys() == other.keys()
            assert all(torch.equal(places, other[layer]) for layer, places in one.items()), name
        assert torch.equal(*answers), name


def by_runtime(op: Any, *args: Any, opset: int = OPSET) -> Any:
    """What ONNX Runtime makes of one op; sizes are unknown to it."""
    graph, feed = fx.Graph(), {}

    def given(value: Any) -> Any:
        if isinstance(value, list):
            return [given(each) for each in value]
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(f"input_{len(feed)}")
        node.meta["val"], feed[str(node.target)] = value, value
        return node

    node = graph.call_function(op, tuple(given(value) for value in args))
    emit = Emitter(None, {}, "", WRITERS, opset=opset)  # type: ignore[arg-type]  # an op alone has no weights
    emit.run(graph)
    found = emit.values[node]
    model = _model(emit, feed, [found] if isinstance(found, str) else list(found))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results = [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in feed.items()})]
    return results[0] if isinstance(found, str) else results


def _model(emit: Emitter, feed: Mapping[str, Tensor], results: list[str]) -> Any:
    inputs = [helper.make_tensor_value_info(n, ELEMENT[x.dtype], [None] * x.dim()) for n, x in feed.items()]
    outputs = [helper.make_empty_tensor_value_info(name) for name in results]
    graph = helper.make_graph(emit.nodes, "op", inputs, outputs, list(emit.initializers.values()))
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", emit.opset)], ir_version=IR_VERSIONS[emit.opset]
    )
