"""What is known of an ONNX graph's tensors before it runs: types, shapes, constants, what shapes alone decide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

ARITHMETIC = {"Add", "Cast", "Ceil", "Concat", "Div", "Floor", "Gather", "Identity", "Max", "Min", "Mod", "Mul"}
ARITHMETIC |= {"Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze"}
"""Operators that sizes are computed with; what they make of few numbers are few numbers."""

FEW = 64
"""Numbers that a tensor may have to be looked at."""


@dataclass(frozen=True)
class Value:
    """One tensor. dtype: as ONNX numbers element types; 0 where it is not known.

    constant: the same in every run. shape_like: decided by constants and shapes alone, so known before data is.
    numbers: of a small constant in the file, or of what is computed from those and from the largest sizes.
    """

    dtype: int = 0
    shape: tuple[int | str, ...] | None = None
    constant: bool = False
    shape_like: bool = False
    numbers: NDArray[Any] | None = None
    is_tensor: bool = True


class Scope:
    """The values of a graph by name, those of the graphs around it included.

    largest: the largest size of symbolic dimensions, as far as they are known.
    """

    def __init__(self, graph: onnx.GraphProto, largest: Mapping[str, int], outer: Scope | None = None) -> None:
        self.outer = outer
        self.largest = largest
        self.values: dict[str, Value] = {}
        for info in (*graph.value_info, *graph.output, *graph.input):
            self.values[info.name] = _described(info)
        for info in graph.input:
            value = self.values[info.name]
            # A small whole number that the caller gives can say a size, as TensorRT's shape inputs do.
            counts = outer is None and value.dtype in _integers() and value.shape is not None and len(value.shape) < 2
            self.values[info.name] = replace(value, shape_like=counts)
        for tensor in graph.initializer:
            self.values[tensor.name] = _constant(tensor)
        for sparse in graph.sparse_initializer:
            self.values[sparse.values.name] = Value(sparse.values.data_type, None, True, True)

    def get(self, name: str) -> Value:
        """What is known of a tensor: nothing, if no graph around holds it."""
        scope: Scope | None = self
        while scope is not None:
            if name in scope.values:
                return scope.values[name]
            scope = scope.outer
        return Value()

    def add(self, node: onnx.NodeProto) -> None:
        """Note what a node's outputs are; nodes come in the order they run."""
        inputs = [self.get(name) for name in node.input if name]
        if node.op_type == "Constant":
            made = next(_constants(node), Value(constant=True, shape_like=True))
        elif node.op_type in ("Shape", "Size"):
            made = Value(shape_like=True, numbers=self._sizes(node, inputs))
        else:
            plain = bool(inputs) and not any(a.HasField("g") or a.graphs for a in node.attribute)
            made = Value(
                constant=plain and all(v.constant for v in inputs),
                shape_like=plain and all(v.shape_like for v in inputs),
                numbers=_computed(node, [self.get(name).numbers for name in node.input]),
            )
        for name in filter(None, node.output):
            known = self.values.get(name, Value())
            self.values[name] = replace(
                known,
                dtype=known.dtype or made.dtype,
                shape=made.shape if known.shape is None else known.shape,
                constant=made.constant,
                shape_like=made.shape_like,
                numbers=made.numbers,
            )

    def _sizes(self, node: onnx.NodeProto, inputs: Sequence[Value]) -> NDArray[Any] | None:
        if node.op_type != "Shape" or not inputs or inputs[0].shape is None:
            return None
        start, end = (attributes(node).get(name) for name in ("start", "end"))
        if not all(x is None or isinstance(x, int) for x in (start, end)):
            return None
        axes = inputs[0].shape[start:end]
        sizes = [self.largest.get(d) if isinstance(d, str) else d for d in axes]
        return None if None in sizes or len(sizes) > FEW else np.array(sizes, np.int64)


def attributes(node: onnx.NodeProto) -> Mapping[str, Any]:
    """A node's plain attributes: numbers and strings (as text); others by name only."""
    from onnx import AttributeProto

    found: dict[str, Any] = {}
    for attribute in node.attribute:
        if attribute.type == AttributeProto.INT:
            found[attribute.name] = attribute.i
        elif attribute.type == AttributeProto.FLOAT:
            found[attribute.name] = attribute.f
        elif attribute.type == AttributeProto.STRING:
            found[attribute.name] = attribute.s.decode("utf-8", "replace")
        else:
            found[attribute.name] = None
    return found


def _described(info: onnx.ValueInfoProto) -> Value:
    if info.type.WhichOneof("value") not in (None, "tensor_type"):
        return Value(is_tensor=False)
    described = info.type.tensor_type
    if not described.HasField("shape"):
        return Value(described.elem_type)
    dims = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in described.shape.dim)
    return Value(described.elem_type, dims)


def _constant(tensor: onnx.TensorProto) -> Value:
    return Value(tensor.data_type, tuple(tensor.dims), True, True, _numbers(tensor))


def _numbers(tensor: onnx.TensorProto) -> NDArray[Any] | None:
    from onnx import TensorProto, numpy_helper

    if tensor.data_location == TensorProto.EXTERNAL or len(tensor.dims) > FEW or not 0 < prod(tensor.dims) <= FEW:
        return None
    try:
        return numpy_helper.to_array(tensor)
    except Exception:  # A tensor whose bytes do not fit its shape; each kind of damage has its own error.
        return None


def _computed(node: onnx.NodeProto, inputs: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    """What a node makes of numbers that are known; None unless all are, and few."""
    from onnx.reference import ReferenceEvaluator

    if node.op_type not in ARITHMETIC or node.domain or not inputs or any(x is None for x in inputs):
        return None
    try:
        with np.errstate(all="ignore"):
            results: Any = ReferenceEvaluator(node).run(None, dict(zip(node.input, inputs)))
            made = np.asarray(results[0])
    except Exception:  # Inputs that do not fit the operator: the evaluator has no error class of its own.
        return None
    return made if made.dtype.kind in "biuf" and 0 < made.size <= FEW else None


def _constants(node: onnx.NodeProto) -> Iterator[Value]:
    from onnx import helper

    for attribute in node.attribute:
        if attribute.name == "value":
            yield _constant(attribute.t)
        elif attribute.name == "value_int":
            yield _constant(helper.make_tensor("", 7, [], [attribute.i]))
        elif attribute.name == "value_float":
            yield _constant(helper.make_tensor("", 1, [], [attribute.f]))
        elif attribute.name == "value_ints":
            yield _constant(helper.make_tensor("", 7, [len(attribute.ints)], attribute.ints))
        elif attribute.name == "value_floats":
            yield _constant(helper.make_tensor("", 1, [len(attribute.floats)], attribute.floats))


def _integers() -> tuple[int, ...]:
    from onnx import TensorProto

    return TensorProto.INT32, TensorProto.INT64
