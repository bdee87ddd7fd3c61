"""What is known of an ONNX graph's tensors before it runs: types, shapes, constants, what shapes alone decide."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

SAME_NUMBERS = ("Identity", "Cast", "Reshape", "Squeeze", "Unsqueeze")
"""Operators whose output holds the numbers of their first input."""

FEW = 64
"""Numbers that a constant may have to be looked at."""


@dataclass(frozen=True)
class Value:
    """One tensor. dtype: as ONNX numbers element types; 0 where it is not known.

    constant: the same in every run. shape_like: decided by constants and shapes alone, so known before data is.
    """

    dtype: int = 0
    shape: tuple[int | str, ...] | None = None
    constant: bool = False
    shape_like: bool = False
    tensor: onnx.TensorProto | None = None
    is_tensor: bool = True

    def numbers(self) -> list[float] | None:
        """A small constant's numbers; None where they are not known, or not in the file."""
        from onnx import TensorProto, numpy_helper

        held = self.tensor
        if held is None or held.data_location == TensorProto.EXTERNAL or len(held.dims) > FEW:
            return None
        size = 1
        for dim in held.dims:
            size *= dim
        if not 0 < size <= FEW:
            return None
        try:
            return [float(x) for x in numpy_helper.to_array(held).reshape(-1)]
        except Exception:  # A tensor whose bytes do not fit its shape; each kind of damage has its own error.
            return None


class Scope:
    """The values of a graph by name, those of the graphs around it included."""

    def __init__(self, graph: onnx.GraphProto, outer: Scope | None = None) -> None:
        self.outer = outer
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
            made = Value(shape_like=True)
        else:
            plain = bool(inputs) and not any(a.HasField("g") or a.graphs for a in node.attribute)
            kept = inputs[0].tensor if inputs and node.op_type in SAME_NUMBERS else None
            made = Value(
                constant=plain and all(v.constant for v in inputs),
                shape_like=plain and all(v.shape_like for v in inputs),
                tensor=kept,
            )
        for name in filter(None, node.output):
            known = self.values.get(name, Value())
            self.values[name] = replace(
                known,
                dtype=known.dtype or made.dtype,
                shape=made.shape if known.shape is None else known.shape,
                constant=made.constant,
                shape_like=made.shape_like,
                tensor=made.tensor,
            )


def attributes(node: onnx.NodeProto) -> Mapping[str, object]:
    """A node's plain attributes: numbers, strings (as text) and lists of them; others by name only."""
    from onnx import AttributeProto

    found: dict[str, object] = {}
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
    return Value(tensor.data_type, tuple(tensor.dims), True, True, tensor)


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
