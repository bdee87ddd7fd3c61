"""Configurations of Triton models (config.pbtxt), and what they say of the tensors of an ONNX graph."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onnx import TensorProto, ValueInfoProto

from foveate.backends.tensorrt.reading import read
from foveate.errors import BackendError

TYPES: dict[int, str] = {
    TensorProto.FLOAT: "TYPE_FP32",
    TensorProto.DOUBLE: "TYPE_FP64",
    TensorProto.FLOAT16: "TYPE_FP16",
    TensorProto.INT64: "TYPE_INT64",
    TensorProto.INT32: "TYPE_INT32",
    TensorProto.BOOL: "TYPE_BOOL",
}
"""ONNX's number of an element type -> Triton's name."""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. type: such as `TYPE_FP32`; dims: sizes of all axes, batch included, -1 for any."""

    name: str
    type: str
    dims: tuple[int, ...]
    optional: bool = False

    def to_text(self) -> str:
        """As it stands in a configuration."""
        optional = " optional: true" if self.optional else ""
        dims = ", ".join(map(str, self.dims))
        return f"{{ name: {json.dumps(self.name)} data_type: {self.type} dims: [ {dims} ]{optional} }}"


@dataclass(frozen=True)
class Config:
    """One model of a repository. parameters: written as JSON; instances: how many on the CPU, None for Triton's choice.

    Sizes depend on each other across a graph's inputs, so Triton may not stack requests: max_batch_size is 0, and
    dims hold the batch axis.
    """

    name: str
    backend: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    decoupled: bool = False
    instances: int | None = None

    def names(self) -> list[list[str]]:
        """Its inputs and outputs."""
        return [[spec.name for spec in specs] for specs in (self.inputs, self.outputs)]

    def to_text(self) -> str:
        """The content of config.pbtxt: protobuf's text form of Triton's message `ModelConfig`."""
        lines = [f"name: {json.dumps(self.name)}", f"backend: {json.dumps(self.backend)}", "max_batch_size: 0"]
        lines += [*_listed("input", self.inputs), *_listed("output", self.outputs)]
        for key, value in self.parameters.items():
            text = json.dumps(json.dumps(value))
            lines.append(f"parameters {{ key: {json.dumps(key)} value {{ string_value: {text} }} }}")
        if self.decoupled:
            lines.append("model_transaction_policy { decoupled: true }")
        if self.instances is not None:
            lines.append(f"instance_group [ {{ kind: KIND_CPU count: {self.instances} }} ]")
        return "\n".join(lines) + "\n"


def of_graph(name: str, path: Path) -> Config:
    """The configuration of an ONNX file; BackendError where Triton or numpy has no type for a tensor."""
    graph = read(path).graph
    inputs, outputs = (tuple(_spec(name, value) for value in values) for values in (graph.input, graph.output))
    return Config(name, "onnxruntime", inputs, outputs)


def _spec(graph: str, value: ValueInfoProto) -> TensorSpec:
    found = value.type.tensor_type
    if found.elem_type == TensorProto.BFLOAT16:
        raise BackendError(
            f"{value.name} of {graph} is bfloat16, which Triton's Python models cannot read: export the model in "
            "float16 or float32"
        )
    dims = tuple(size.dim_value if size.HasField("dim_value") else -1 for size in found.shape.dim)
    if found.elem_type not in TYPES or not dims or 0 in dims:
        raise BackendError(
            f"{value.name} of {graph} has element type {found.elem_type} and dims {list(dims)}, which no Triton "
            "configuration can say"
        )
    return TensorSpec(value.name, TYPES[found.elem_type], dims)


def _listed(name: str, specs: Iterable[TensorSpec]) -> list[str]:
    return [f"{name} [", ",\n".join(f"  {spec.to_text()}" for spec in specs), "]"]
