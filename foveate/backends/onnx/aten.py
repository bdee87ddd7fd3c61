"""What torch's own ops become in ONNX."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from foveate.backends.onnx.emit import ELEMENT, END, Emitter, Writer
from foveate.backends.onnx.opsets import FUSED
from foveate.ir.program import args_of
from foveate.ir.rewriter import shape

aten = torch.ops.aten


def dtype_of(node: fx.Node) -> torch.dtype:
    """The dtype of a node's value."""
    value: Tensor = node.meta["val"]
    return value.dtype


def axis_of(node: fx.Node, axis: int) -> int:
    """An axis counted from the front."""
    return axis % len(shape(node))


def _binary(kind: str) -> Writer:
    def write(emit: Emitter, node: fx.Node) -> str:
        a, b = args_of(node)[:2]
        like = dtype_of(node)
        if kind == "Mul" and b == 1:
            return emit.value(a)
        if kind == "Mul" and emit.opset >= FUSED and (found := _rms_norm(node)):
            source, epsilon, weight = found
            return str(emit.op("RMSNormalization", emit.value(source), emit.value(weight), epsilon=epsilon))
        return str(emit.op(kind, emit.value(a, like), emit.value(b, like)))

    return write


def _rms_norm(node: fx.Node) -> tuple[fx.Node, float, fx.Node] | None:
    """(x, epsilon, weight) where a product is weight * (x * rsqrt(mean(x ** 2) + epsilon)), all in one dtype."""
    weight, normed = args_of(node)[:2]
    if not (_is(weight, "get_attr") and _is(normed, aten.mul.Tensor)):
        return None
    source, root = args_of(normed)[:2]
    if not _is(root, aten.rsqrt.default) or not _is(args_of(root)[0], aten.add.Tensor):
        return None
    mean, epsilon = args_of(args_of(root)[0])[:2]
    if not _is(mean, aten.mean.dim) or args_of(mean)[1:] != ([-1], True) or not isinstance(epsilon, float):
        return None
    square = args_of(mean)[0]
    same = _is(square, aten.pow.Tensor_Scalar) and args_of(square) == (source, 2)
    return (source, epsilon, weight) if same and dtype_of(source) == dtype_of(weight) else None


def _is(value: Any, target: Any) -> bool:
    return isinstance(value, fx.Node) and (value.target == target or value.op == target)


def _unary(kind: str, **attributes: Any) -> Writer:
    return lambda emit, node: emit.op(kind, emit.value(args_of(node)[0]), **attributes)


def _linear(emit: Emitter, node: fx.Node) -> str:
    """Gemm takes a weight's rows as they lie, [rows, columns]; tokens are laid out as rows for it."""
    x, weight, *bias = args_of(node)
    rows, columns = (int(n) for n in shape(weight))
    name = emit.value(x)
    given = [emit.value(b) for b in bias if b is not None]
    flat = emit.op("Gemm", emit.reshape(name, -1, columns), emit.value(weight), *given, transB=1)
    leading: list[int | str] = [
        n if isinstance(n, int) else emit.length(name, axis) for axis, n in enumerate(shape(x)[:-1])
    ]
    return emit.reshape(flat, *leading, rows)


def _slice(emit: Emitter, node: fx.Node) -> str:
    source, axis, start, stop, *step = args_of(node)
    axis = axis_of(source, axis)
    whole = shape(source)[axis]
    if step and step != [1]:
        return str(emit.op("Slice", emit.value(source), *(emit.size(x) for x in (start, stop, axis, step[0]))))
    if start == 0 and stop in (END, whole):
        return emit.value(source)
    if source.op == "get_attr" and axis == 0 and isinstance(whole, int):
        return emit.weight(str(source.target), (start, min(stop, whole)))
    return emit.slice(emit.value(source), axis, emit.size(start), emit.size(stop))


def _transpose(emit: Emitter, node: fx.Node) -> str:
    source, *axes = args_of(node)
    order = list(range(len(shape(source))))
    a, b = (axis_of(source, axis) for axis in axes)
    order[a], order[b] = order[b], order[a]
    return str(emit.op("Transpose", emit.value(source), perm=order))


def _sizes(emit: Emitter, value: str, lengths: list[Any], offset: int = 0) -> list[int | str]:
    """Sizes of a value's axes from `offset` on, numbers where they are known."""
    return [n if isinstance(n, int) else emit.length(value, offset + i) for i, n in enumerate(lengths)]


def _unflatten(emit: Emitter, node: fx.Node) -> str:
    source, axis, sizes = args_of(node)
    axis, value, lengths = axis_of(source, axis), emit.value(source), list(shape(source))
    before, behind = _sizes(emit, value, lengths[:axis]), _sizes(emit, value, lengths[axis + 1 :], axis + 1)
    return emit.reshape(value, *before, *(n if isinstance(n, int) else emit.size(n) for n in sizes), *behind)


def _flatten(emit: Emitter, node: fx.Node) -> str:
    source, *ends = args_of(node)
    lengths, value = list(shape(source)), emit.value(source)
    start, stop = (axis_of(source, end) for end in (*ends, *(0, -1)[len(ends) :]))
    merged = lengths[start : stop + 1]
    size: int | str = math.prod(merged) if all(isinstance(n, int) for n in merged) else -1
    before, behind = _sizes(emit, value, lengths[:start]), _sizes(emit, value, lengths[stop + 1 :], stop + 1)
    if size == -1 and not all(isinstance(n, int) for n in behind + before):
        # With no token at all, -1 would be ambiguous.
        parts = [emit.length(value, axis) for axis in range(start, stop + 1)]
        size = emit.op("ReduceProd", emit.concat(parts, 0), keepdims=1)
    return emit.reshape(value, *before, size, *behind)


def _cat(emit: Emitter, node: fx.Node) -> str:
    parts, *axis = args_of(node)
    return emit.concat([emit.value(part) for part in parts], axis_of(node, axis[0] if axis else 0))


def _reduce(kind: str) -> Writer:
    def write(emit: Emitter, node: fx.Node) -> str:
        source, axes, *keep = args_of(node)
        names = emit.constant([axis_of(source, axis) for axis in axes])
        return str(emit.op(kind, emit.value(source), names, keepdims=int(bool(keep and keep[0]))))

    return write


def _power(emit: Emitter, node: fx.Node) -> str:
    source, exponent = args_of(node)
    value = emit.value(source)
    return str(
        emit.op("Mul", value, value) if exponent == 2 else emit.op("Pow", value, emit.value(exponent, dtype_of(node)))
    )


def _rsqrt(emit: Emitter, node: fx.Node) -> str:
    return str(emit.op("Reciprocal", emit.op("Sqrt", emit.value(args_of(node)[0]))))


def silu(emit: Emitter, x: str) -> str:
    """As `torch.nn.functional.silu`."""
    return str(emit.op("Mul", x, emit.op("Sigmoid", x)))


def gelu(emit: Emitter, x: str, approximate: str = "none") -> str:
    """As `torch.nn.functional.gelu`."""
    return str(emit.op("Gelu", x, approximate=approximate))


def _silu(emit: Emitter, node: fx.Node) -> str:
    return silu(emit, emit.value(args_of(node)[0]))


def _gelu(emit: Emitter, node: fx.Node) -> str:
    return gelu(emit, emit.value(args_of(node)[0]), str(node.kwargs.get("approximate", "none")))


def _layer_norm(emit: Emitter, node: fx.Node) -> str:
    source, normalized, weight, bias, *rest = args_of(node)
    names = [emit.value(x) for x in (source, weight, bias)]
    return str(emit.op("LayerNormalization", *names, axis=-len(normalized), epsilon=rest[0] if rest else 1e-5))


def _conv2d(emit: Emitter, node: fx.Node) -> str:
    source, weight, bias, stride, *rest = (*args_of(node), None, [1, 1])[: max(4, len(node.args))]
    names = [emit.value(x) for x in (source, weight, bias) if x is not None]
    pads = list(rest[0]) * 2 if rest and not isinstance(rest[0], str) else [0, 0, 0, 0]
    return str(emit.op("Conv", *names, strides=list(stride), pads=pads))


def _expand(emit: Emitter, node: fx.Node) -> str:
    source, sizes = args_of(node)
    missing = len(sizes) - len(shape(source))
    parts = [emit.constant([1]) if n == -1 and i >= missing else emit.size(n) for i, n in enumerate(sizes)]
    return str(emit.op("Expand", emit.value(source), emit.concat(parts, 0)))


def _resize(emit: Emitter, node: fx.Node) -> str:
    """Both sides of an image by a matrix each, whose rows are torch's own filters: other resizers' edges differ."""
    source, sizes, *_ = args_of(node)
    filters = []
    for before, after in zip(shape(source)[2:], sizes, strict=True):
        same = torch.eye(int(before), dtype=torch.float32)[None, None]
        filters.append(aten._upsample_bilinear2d_aa(same, [after, int(before)], False)[0, 0])
    rows, columns = (emit.constant(each.tolist(), dtype_of(node)) for each in (filters[0], filters[1].T))
    return str(emit.op("MatMul", emit.op("MatMul", rows, emit.value(source)), columns))


def _select(emit: Emitter, node: fx.Node) -> str:
    source, axis, place = args_of(node)
    return str(emit.op("Gather", emit.value(source), emit.constant(place), axis=axis_of(source, axis)))


WRITERS: dict[Any, Writer] = {
    aten.add.Tensor: _binary("Add"),
    aten.add.Scalar: _binary("Add"),
    aten.mul.Tensor: _binary("Mul"),
    aten.mul.Scalar: _binary("Mul"),
    aten.matmul.default: lambda emit, node: emit.op("MatMul", *(emit.value(x) for x in node.args)),
    aten.cos.default: _unary("Cos"),
    aten.sin.default: _unary("Sin"),
    aten.neg.default: _unary("Neg"),
    aten.log.default: _unary("Log"),
    aten.sigmoid.default: _unary("Sigmoid"),
    aten.detach.default: lambda emit, node: emit.value(node.args[0]),
    aten.silu.default: _silu,
    aten.gelu.default: _gelu,
    aten.rsqrt.default: _rsqrt,
    aten.pow.Tensor_Scalar: _power,
    aten.linear.default: _linear,
    aten.layer_norm.default: _layer_norm,
    aten.conv2d.default: _conv2d,
    aten.embedding.default: lambda emit, node: emit.op("Gather", *(emit.value(x) for x in node.args[:2])),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.transpose.int: _transpose,
    aten.unflatten.int: _unflatten,
    aten.flatten.using_ints: _flatten,
    aten.unsqueeze.default: lambda emit, node: emit.unsqueeze(
        emit.value(node.args[0]), axis_of(node, args_of(node)[1])
    ),
    aten.cat.default: _cat,
    aten.expand.default: _expand,
    aten.sum.dim_IntList: _reduce("ReduceSum"),
    aten.mean.dim: _reduce("ReduceMean"),
    aten.softmax.int: lambda emit, node: emit.op(
        "Softmax", emit.value(node.args[0]), axis=axis_of(node, args_of(node)[1])
    ),
    aten.sym_size.int: lambda emit, node: emit.length(emit.value(node.args[0]), args_of(node)[1]),
    aten.to.dtype: lambda emit, node: emit.op("Cast", emit.value(node.args[0]), to=ELEMENT[dtype_of(node)]),
    aten._upsample_bilinear2d_aa.default: _resize,
}
