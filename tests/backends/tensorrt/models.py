"""Small ONNX models, made here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import save_file

FLOAT, INT64, BOOL, DOUBLE = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.DOUBLE
QKV = {name: (FLOAT, ["batch", 2, "tokens", 4]) for name in "qkv"}
Described = dict[str, tuple[int, Sequence[int | str]]]


def info(name: str, dtype: int, shape: Sequence[int | str] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def model(
    nodes: list[onnx.NodeProto],
    inputs: Described,
    outputs: Sequence[str] = ("y",),
    constants: dict[str, Any] | None = None,
    opset: int = 23,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """Outputs get their types by inference."""
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()]
    made = [onnx.ValueInfoProto(name=name) for name in outputs]
    graph = helper.make_graph(nodes, "graph", [info(n, *d) for n, d in inputs.items()], made, tensors)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=10)


def decoder(path: Path, weights: str = "model.safetensors") -> np.ndarray:
    """A norm, a projection from external weights, attention and a top-k, at `path`; its weights beside it."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((8, 8)).astype(np.float32)
    save_file({"w": table}, path.parent / "model.safetensors")
    size = int.from_bytes((path.parent / "model.safetensors").read_bytes()[:8], "little") + 8
    w = TensorProto(name="w", data_type=FLOAT, dims=[8, 8], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": weights, "offset": size, "length": table.nbytes}.items():
        w.external_data.add(key=key, value=str(value))
    constants = {"gain": np.ones(8, np.float32), "heads": np.array([0, 0, 2, 4]), "flat": np.array([0, 0, 8])}
    constants |= {"k": np.array([2]), "axes": np.array([-1])}
    nodes = [
        helper.make_node("RMSNormalization", ["x", "gain"], ["n"], "norm"),
        helper.make_node("MatMul", ["n", "w"], ["p"], "project"),
        helper.make_node("Reshape", ["p", "heads"], ["h"]),
        helper.make_node("Transpose", ["h"], ["t"], perm=[0, 2, 1, 3]),
        helper.make_node("Attention", ["t", "t", "t"], ["a"], "attention", is_causal=1, softmax_precision=1),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["b", "flat"], ["y"]),
        helper.make_node("ReduceSum", ["y", "axes"], ["scores"], keepdims=0),
        helper.make_node("TopK", ["scores", "k"], ["best", "kept"], "select"),
    ]
    inputs: Described = {"x": (FLOAT, ["batch", "visual_tokens", 8])}
    made = model(nodes, inputs, (), constants)
    made.graph.initializer.append(w)
    made.graph.output.extend([info("y", FLOAT, ["batch", "visual_tokens", 8]), info("kept", INT64, ["batch", 2])])
    path.write_bytes(made.SerializeToString())
    return table
