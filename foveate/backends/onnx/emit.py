"""Writes a program's graph as ONNX, node by node, in standard operators only.

    y = linear(x, w[:k])     ->     Reshape, Gemm(x, w', transB=1), Reshape      w' the first k rows of w, where w lies

Weights are external data: an initializer is a place in `model.safetensors`, so that every graph of a package reads the
one file, and a slice of a weight's rows is a shorter piece of the same bytes. What an op becomes stands in the tables
of `aten`, `attention`, `selection` and their neighbours; an op that stands in none is refused with the pass that made
it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from operator import getitem
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

from foveate.backends.onnx.nodes import DOMAIN, needed
from foveate.backends.onnx.opsets import OPSET
from foveate.errors import BackendError
from foveate.ir.program import Program, args_of, info
from foveate.ops import PAD

__all__ = ["ELEMENT", "PAD", "Emitter", "Place", "Writer", "refusal"]

ELEMENT: dict[torch.dtype, int] = {
    torch.float32: TensorProto.FLOAT,
    torch.float64: TensorProto.DOUBLE,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.bool: TensorProto.BOOL,
}
"""ONNX's number for a dtype."""

END = 2**63 - 1
"""Where a slice ends that goes on to the end of its axis."""


@dataclass(frozen=True)
class Place:
    """Where a weight's bytes lie in the file that all graphs share."""

    offset: int
    length: int


Writer = Callable[["Emitter", fx.Node], Any]
"""Emits one node: the name of its value, or a tuple of names for an op that returns several."""


class Emitter:
    """One ONNX graph in the making.

    places: where each weight lies; file: of that name, beside the graph. blocks: of queries that attend one after
    another where later ones see more keys. opset: one of `foveate.backends.onnx.opsets`. plugin: whether neighbour
    attention is a local function, see `foveate.backends.onnx.plugin`.
    """

    def __init__(
        self,
        program: Program,
        places: Mapping[str, Place],
        file: str,
        writers: Mapping[Any, Writer],
        blocks: int = 1,
        opset: int = OPSET,
        plugin: bool = False,
    ) -> None:
        self.blocks, self.opset, self.plugin = blocks, opset, plugin
        self.program = program
        self.places, self.file = places, file
        self.writers = writers
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.functions: dict[str, onnx.FunctionProto] = {}
        self.values: dict[fx.Node, Any] = {}
        self.numbers = count()  # of operators, those of loops' bodies too
        self.made: dict[Any, Any] = {}  # what was emitted already: the same op of the same values is not emitted twice

    def run(self, graph: fx.Graph) -> None:
        """Emit every node of a graph; `values` then holds the names of their values."""
        for node in graph.nodes:
            if node.op == "placeholder":
                self.values[node] = str(node.target)
            elif node.op == "get_attr":
                self.values[node] = self.weight(str(node.target))
            elif node.op == "call_function":
                self.values[node] = self._call(node)

    def _call(self, node: fx.Node) -> Any:
        if node.target is getitem:
            source, place = args_of(node)
            return self.values[source][place]
        writer = self.writers.get(node.target)
        if writer is None:
            raise BackendError(refusal(self.program, node))
        return writer(self, node)

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Emit one operator; "" stands for an input that is left out. Returns its value's name, or a tuple of names."""
        key = (kind, inputs, outputs, tuple(sorted((k, str(v)) for k, v in attributes.items())))
        if key not in self.made:
            label = f"{kind}_{next(self.numbers)}"
            names = [label + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
            self.nodes.append(helper.make_node(kind, list(inputs), names, name=label, **attributes))
            self.made[key] = names[0] if outputs == 1 else tuple(names)
        return self.made[key]

    def loop(self, times: int | str, state: Mapping[str, torch.dtype], body: Callable[..., Sequence[str]]) -> list[str]:
        """What values become when `body` runs so many times: (number of the run int64 [], *values) -> as many values.

        times: a number, or int64 []. state: the values before the first run, and their dtypes. A body may read all that
        was made outside it.
        """
        label = f"Loop_{next(self.numbers)}"
        outside = self.nodes, self.made
        # What is made in a body is seen in it alone.
        self.nodes, self.made = [], dict(self.made)
        number, more, *given = (f"{label}_{part}" for part in ("number", "more", *range(len(state))))
        found = [more, *body(number, *given)]
        ends = [f"{label}_end_{i}" for i in range(len(found))]
        nodes = [
            *self.nodes,
            *(helper.make_node("Identity", [a], [b], name=b) for a, b in zip(found, ends, strict=True)),
        ]
        self.nodes, self.made = outside
        kinds = [TensorProto.BOOL, *(ELEMENT[dtype] for dtype in state.values())]
        starts, stops = (
            [helper.make_tensor_value_info(name, kind, None) for name, kind in zip(names, kinds, strict=True)]
            for names in ([more, *given], ends)
        )
        first = helper.make_tensor_value_info(number, TensorProto.INT64, [])
        graph = helper.make_graph(nodes, f"{label}_body", [first, *starts], stops)
        results = [f"{label}_{i}_last" for i in range(len(state))]
        runs = times if isinstance(times, str) else self.constant(times)
        inputs = [runs, self.constant(True), *state]
        self.nodes.append(helper.make_node("Loop", inputs, results, name=label, body=graph))
        return results

    def call(self, name: str, inputs: Sequence[str], body: Callable[..., str], **attributes: Any) -> str:
        """Call the local function of this name, made of what `body` emits: (names of its inputs) -> that of its result.

        attributes: what a runtime with a kernel of its own needs to know; the body does not read them.
        """
        if name not in self.functions:
            outside = self.nodes, self.made, self.initializers
            self.nodes, self.made, self.initializers = [], {}, {}
            parameters = [f"{name}_{i}" for i in range(len(inputs))]
            result = body(*parameters)
            constants = [helper.make_node("Constant", [], [t.name], value=t) for t in self.initializers.values()]
            opsets = [helper.make_opsetid("", self.opset)]
            self.functions[name] = helper.make_function(
                DOMAIN, name, parameters, [result], [*constants, *self.nodes], opsets, list(attributes)
            )
            self.nodes, self.made, self.initializers = outside
        label = f"{name}_{next(self.numbers)}"
        self.nodes.append(helper.make_node(name, list(inputs), [label], name=label, domain=DOMAIN, **attributes))
        return label

    def constant(self, value: Any, dtype: torch.dtype | None = None) -> str:
        """A constant: numbers and arrays of integers as int64, of floats as fp32, or as `dtype`."""
        array = np.asarray(value)
        if dtype is None:
            dtype = torch.float32 if array.dtype.kind == "f" else torch.bool if array.dtype.kind == "b" else torch.int64
        tensor = torch.from_numpy(array.copy()).to(dtype)
        key = ("constant", tuple(tensor.shape), dtype, str(tensor.tolist()))
        if key not in self.made:
            name = f"constant_{len(self.initializers)}"
            self.initializers[name] = _literal(tensor, name)
            self.made[key] = name
        return str(self.made[key])

    def weight(self, name: str, rows: tuple[int, int] | None = None) -> str:
        """A weight as it lies in the file, or some of its rows, which are a part of the same bytes."""
        value = self.program.weights.get(name)
        place, shape, label = self.places[name], list(value.shape), name
        if rows is not None and rows != (0, shape[0]):
            row = place.length // shape[0]
            place = Place(place.offset + rows[0] * row, (rows[1] - rows[0]) * row)
            shape[0], label = rows[1] - rows[0], f"{name}[{rows[0]}:{rows[1]}]"
        if label not in self.initializers:
            self.initializers[label] = self._external(label, value.dtype, shape, place)
        return label

    def _external(self, label: str, dtype: torch.dtype, shape: Sequence[int], place: Place) -> onnx.TensorProto:
        tensor = TensorProto(name=label, data_type=ELEMENT[dtype], dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        for key, text in (("location", self.file), ("offset", place.offset), ("length", place.length)):
            tensor.external_data.add(key=key, value=str(text))
        return tensor

    def value(self, arg: Any, like: torch.dtype = torch.int64) -> str:
        """The name of an argument's value: of a node, or of a number as a constant of dtype `like`."""
        return str(self.values[arg]) if isinstance(arg, fx.Node) else self.constant(arg, like)

    def size(self, arg: Any) -> str:
        """A size as int64 [1]: of a number, of a node that is one, or of a symbolic size."""
        if isinstance(arg, fx.Node):
            return str(self.values[arg])
        return self.constant([int(arg)])

    def length(self, value: str, axis: int) -> str:
        """How long an axis is: int64 [1]."""
        return str(self.op("Shape", value, start=axis, end=axis + 1))

    def cast(self, value: str, dtype: torch.dtype) -> str:
        """The value in another dtype."""
        return str(self.op("Cast", value, to=ELEMENT[dtype]))

    def reshape(self, value: str, *sizes: int | str) -> str:
        """A value in another shape: numbers, -1 once, or names of int64 [1]."""
        if all(isinstance(size, int) for size in sizes):
            return str(self.op("Reshape", value, self.constant(list(sizes)), allowzero=1))
        parts = [self.constant([size]) if isinstance(size, int) else size for size in sizes]
        return str(self.op("Reshape", value, self.op("Concat", *parts, axis=0), allowzero=1))

    def slice(self, value: str, axis: int, start: str, stop: str) -> str:
        """Part of an axis; start and stop int64 [1]."""
        return str(self.op("Slice", value, start, stop, self.constant([axis])))

    def unsqueeze(self, value: str, *axes: int) -> str:
        """New axes of length 1."""
        return str(self.op("Unsqueeze", value, self.constant(list(axes))))

    def concat(self, values: Sequence[str], axis: int) -> str:
        """Values one behind another."""
        return values[0] if len(values) == 1 else str(self.op("Concat", *values, axis=axis))

    def used(self, results: Sequence[str]) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """The nodes and initializers that results need, in order."""
        kept, wanted = needed(self.nodes, results)
        return kept, [tensor for name, tensor in self.initializers.items() if name in wanted]


def _literal(tensor: Tensor, name: str) -> onnx.TensorProto:
    if tensor.dtype == torch.bfloat16:
        raw = tensor.contiguous().view(torch.int16).numpy().tobytes()
        return helper.make_tensor(name, TensorProto.BFLOAT16, list(tensor.shape), raw, raw=True)
    return numpy_helper.from_array(tensor.numpy(), name)


def refusal(program: Program, node: fx.Node) -> str:
    """Why a program is not exported: the pass and the node that have no form."""
    by = info(node).by
    whose = next((r.text for r in program.passes if r.text.partition("{")[0] == by), by)
    return (
        f"{whose} cannot be exported to ONNX: {node.target} (node {node.name}, layer {info(node).layer}) has no form "
        "in standard operators yet; leave the pass out, or run the model with backend eager or inductor"
    )
