"""Token-axis analysis: which axis of each value counts tokens, and which ops keep tokens apart.

A forward dataflow over a graph in which each value has one token axis or none. An op whose rule is not known, or
that would mix tokens, is an error that names the node; nothing is guessed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from foveate import ops
from foveate.errors import TraceError
from foveate.ir.program import args_of, info
from foveate.ir.rewriter import shape

aten = torch.ops.aten
LAST = aten.slice.Tensor

Axes = dict[fx.Node, int | None]
"""Token axis of each node, counted from the front; None where a value does not depend on tokens."""


class _MixesError(Exception):
    """An op would mix tokens."""


def token_axes(graph: fx.Graph, inputs: dict[str, int]) -> Axes:
    """The token axis of every value, given that of the inputs (by placeholder name).

    Raises TraceError naming the node, its layer and module, and the op, where tokens are mixed.
    """
    axes: Axes = {}
    counts: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder":
            axes[node] = inputs.get(node.name)
        elif node.op == "get_attr":
            axes[node] = None
        elif node.op == "call_function":
            axes[node] = _axis(node, axes, counts)
    return axes


def takes_last(node: fx.Node, axes: Axes) -> bool:
    """Whether a node keeps the last token only."""
    if node.target != LAST:
        return False
    source, dim, start = (*args_of(node), 0, None)[:3]
    return axes.get(source) == dim and bool(start == -1)


def _axis(node: fx.Node, axes: Axes, counts: set[fx.Node]) -> int | None:
    """The token axis of a node; one that counts the tokens is put into `counts`, and refused where it is used."""
    counted = not counts.isdisjoint(node.all_input_nodes)
    if all(axes.get(n) is None for n in node.all_input_nodes) and not counted:
        return None
    if node.target == aten.sym_size.int:
        source, dim = args_of(node)
        if dim % _dims(source) == axes[source]:
            counts.add(node)
        return None
    rule = RULES.get(node.target)
    about = info(node)
    place = f"layer {about.layer}, {about.role}, node {node.name}: {node.target}"
    if rule is None:
        raise TraceError(f"{place} is not known to keep tokens apart")
    try:
        if counted:
            raise _MixesError("it depends on how many tokens there are")
        return rule(node, axes)
    except _MixesError as reason:
        raise TraceError(f"{place} mixes tokens: {reason}") from None


def _dims(node: fx.Node) -> int:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.dim()


def _elementwise(node: fx.Node, axes: Axes) -> int | None:
    """Values align from the right; those with a token axis must have it in the same place."""
    rank = _dims(node)
    places = {rank - _dims(n) + a for n in node.all_input_nodes if (a := axes.get(n)) is not None}
    if len(places) != 1:
        raise _MixesError("its operands have their tokens on different axes")
    place = places.pop()
    for operand in node.all_input_nodes:
        mirrored = place - (rank - _dims(operand))
        if axes.get(operand) is None and mirrored >= 0 and shape(operand)[mirrored] != 1:
            raise _MixesError(f"{operand.name} has one value for each place in the sequence")
    return place


def _same(node: fx.Node, axes: Axes) -> int | None:
    source: fx.Node = args_of(node)[0]
    return axes[source]


def _first(node: fx.Node, axes: Axes) -> tuple[int, int]:
    source = args_of(node)[0]
    axis = axes.get(source)
    if axis is None:
        raise _MixesError("its second operand has tokens and its first has none")
    return axis, _dims(source)


def _linear(node: fx.Node, axes: Axes) -> int | None:
    axis, rank = _first(node, axes)
    if axis == rank - 1 or any(axes.get(n) is not None for n in node.all_input_nodes[1:]):
        raise _MixesError("it contracts the token axis or multiplies tokens by tokens")
    return axis


def _unflatten(node: fx.Node, axes: Axes) -> int | None:
    axis, rank = _first(node, axes)
    dim = args_of(node)[1] % rank
    if dim == axis:
        raise _MixesError("it splits the token axis")
    return axis if axis < dim else axis + _dims(node) - rank


def _flatten(node: fx.Node, axes: Axes) -> int | None:
    axis, rank = _first(node, axes)
    start, stop = (d % rank for d in (*args_of(node)[1:], *(0, -1)[len(node.args) - 1 :])[:2])
    if start <= axis <= stop:
        raise _MixesError("it folds the token axis into another")
    return axis if axis < start else axis - (stop - start)


def _transpose(node: fx.Node, axes: Axes) -> int | None:
    axis, rank = _first(node, axes)
    a, b = (d % rank for d in args_of(node)[1:3])
    return int({a: b, b: a}.get(axis, axis))


def _unsqueeze(node: fx.Node, axes: Axes) -> int | None:
    axis, rank = _first(node, axes)
    dim = args_of(node)[1] % (rank + 1)
    return axis + 1 if dim <= axis else axis


def _slice(node: fx.Node, axes: Axes) -> int | None:
    axis, rank = _first(node, axes)
    if args_of(node)[1] % rank == axis:
        if takes_last(node, axes):
            return None
        raise _MixesError("it slices the token axis")
    return axis


def _select(node: fx.Node, axes: Axes) -> int | None:
    axis, rank = _first(node, axes)
    dim = args_of(node)[1] % rank
    if dim == axis:
        raise _MixesError("it picks one token")
    return axis - 1 if dim < axis else axis


def _over(node: fx.Node, axes: Axes, dims: Any) -> int | None:
    axis, rank = _first(node, axes)
    if axis in {d % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims])}:
        raise _MixesError("it reduces over the token axis")
    return axis


def _reduce(node: fx.Node, axes: Axes) -> int | None:
    source, dims, *rest = args_of(node)
    if not dims:
        raise _MixesError("it reduces over every axis")
    axis = _over(node, axes, dims)
    if axis is not None and not (rest and rest[0]):
        axis -= sum(d % _dims(source) < axis for d in dims)
    return axis


def _softmax(node: fx.Node, axes: Axes) -> int | None:
    return _over(node, axes, args_of(node)[1])


def _norm(node: fx.Node, axes: Axes) -> int | None:
    _, rank = _first(node, axes)
    normalized = args_of(node)[1]
    return _over(node, axes, list(range(rank - len(normalized), rank)))


def _cat(node: fx.Node, axes: Axes) -> int | None:
    parts, *rest = args_of(node)
    found = {axes.get(p) for p in parts}
    dim = rest[0] if rest else 0
    axis = next(iter(found))
    if len(found) != 1 or axis is None or dim % _dims(node) == axis:
        raise _MixesError("it joins values along or across the token axis")
    return axis


def _matmul(node: fx.Node, axes: Axes) -> int | None:
    left, right = args_of(node)
    a, b, rank = axes.get(left), axes.get(right), _dims(node)
    if a is not None and b is None and a == _dims(left) - 2:
        return rank - 2
    if a is None and b is not None and b == _dims(right) - 1:
        return rank - 1
    raise _MixesError("it contracts the token axis or multiplies tokens by tokens")


def _experts(node: fx.Node, axes: Axes) -> int | None:
    axis, rank = _first(node, axes)
    logits, *weights = args_of(node)[1:4]
    if axis == rank - 1 or axes.get(logits) != axis or any(axes.get(n) is not None for n in weights):
        raise _MixesError("its tokens and their choices stand on different axes")
    return axis


def _attention(node: fx.Node, axes: Axes) -> int | None:
    return 1


def _scores(node: fx.Node, axes: Axes) -> int | None:
    return _dims(node) - 1


def _selection(node: fx.Node, axes: Axes) -> int | None:
    return 1


def _counted(node: fx.Node, axes: Axes) -> int | None:
    """Of all tokens together; no value that a token is made from depends on it."""
    return None


def _take(node: fx.Node, axes: Axes) -> int | None:
    axis, _ = _first(node, axes)
    if axis != node.args[2]:
        raise _MixesError("it gathers along another axis")
    return axis


Rule = Callable[[fx.Node, Axes], int | None]

ELEMENTWISE = (
    *(getattr(aten, name).Tensor for name in ("add", "sub", "mul", "div")),
    *(getattr(aten, name).default for name in ("neg", "silu", "gelu", "sigmoid", "tanh", "relu", "rsqrt", "sqrt")),
    *(getattr(aten, name).default for name in ("cos", "sin", "exp", "abs", "reciprocal")),
    aten.pow.Tensor_Scalar,
    aten.to.dtype,
)

RULES: dict[Any, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    aten.linear.default: _linear,
    aten.unflatten.int: _unflatten,
    aten.flatten.using_ints: _flatten,
    aten.transpose.int: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    aten.mean.dim: _reduce,
    aten.sum.dim_IntList: _reduce,
    aten.softmax.int: _softmax,
    aten.rms_norm.default: _norm,
    aten.layer_norm.default: _norm,
    aten.cat.default: _cat,
    aten.matmul.default: _matmul,
    ops.experts: _experts,
    ops.attention: _attention,
    ops.neighbor_attention: _attention,
    ops.attention_row: _scores,
    ops.random_scores: _selection,
    ops.grid_scores: _selection,
    ops.top_tokens: _selection,
    ops.raters: _selection,
    ops.rater_scores: _selection,
    ops.recycle_tokens: _selection,
    ops.rater_rank: _counted,
    ops.rank_tokens: _selection,
    ops.merge_tokens: _selection,
    ops.dart_scores: _selection,
    ops.cross_attention: _attention,
    ops.mean_token: _counted,
    ops.decide: _selection,
    ops.weighted_attention: _attention,
    ops.attention_sums: _counted,
    ops.neighbor_sums: _counted,
    ops.snapkv_tokens: _counted,
    ops.heavy_tokens: _counted,
    ops.take_keys: _counted,
    ops.window_tokens: _selection,
    ops.received_attention: _selection,
    ops.attention_statistics: _counted,
    ops.activity: _counted,
    ops.divergence: _counted,
    operator.getitem: _same,
    ops.take_tokens: _take,
}
