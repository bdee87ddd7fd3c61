"""Text does in parts what visual tokens do a part of, so that `join` can do that part once for all tokens.

    split, visual tokens use k rows of w               parts
    y.visual = linear(h.visual, w[:k])                 y.visual = linear(h.visual, w[:k])
    y.text   = linear(h.text, w)                       y1.text = linear(h.text, w[:k]);  y2.text = linear(h.text, w[k:])
    z.text   = linear(act(y.text), u)                  z.text = linear(act(y1), u[:, :k]) + linear(act(y2), u[:, k:])

`w[:k]` is then read once, by one matmul over all tokens. What lies between two such linears (activations, rotary
embeddings, heads that attend apart) works on each part alone; where something needs the whole, it is put together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from foveate import ops
from foveate.ir.program import NodeInfo, Program, args_of, copy_graph, info
from foveate.ir.rewriter import Rewriter, equal_nodes, map_arg, shape
from foveate.ir.tokens import ELEMENTWISE

aten = torch.ops.aten


@dataclass(frozen=True)
class Parts:
    """A value cut in two along an axis: the part that visual tokens share, and the rest."""

    axis: int
    nodes: tuple[fx.Node, fx.Node]


def share_parts(program: Program, graph: fx.Graph) -> fx.Graph:
    """A split prefill graph in parts as above: a copy, or the graph itself where nothing is a part of anything."""
    return _Sharer(program, copy_graph(graph)).run() if _cuts(graph) else graph


class _Sharer:
    def __init__(self, program: Program, graph: fx.Graph) -> None:
        self.edit = Rewriter(program, graph, by="share")
        self.graph = graph
        self.cuts = _cuts(graph)
        self.parts: dict[fx.Node, Parts] = {}
        self.sums: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}

    def run(self) -> fx.Graph:
        for node in list(self.graph.nodes):
            if node.op == "call_function":
                with self.edit.before(node):
                    self._visit(node)
        for node, parts in self.parts.items():
            # A cat of the very parts is the whole already.
            if node.target != aten.cat.default or list(args_of(node)[0]) != list(parts.nodes):
                self._put_together(node, aten.cat.default, list(parts.nodes), parts.axis)
        for node, summands in self.sums.items():
            self._put_together(node, aten.add.Tensor, *summands)
        self.edit.sweep()
        return self.graph

    def _put_together(self, node: fx.Node, op: Any, *args: Any) -> None:
        """Whoever needs all of a value that was made in parts gets it whole."""
        users = [u for u in node.users if u not in self.parts and u not in self.sums]
        if users:
            with self.edit.before(node):
                self.edit.replace(node, self._call(op, node, *args), where=users.__contains__)

    def _visit(self, node: fx.Node) -> None:
        dim, kept = self.cuts.get(node, (None, 0))
        if dim == 0:
            self.parts[node] = Parts(len(shape(node)) - 1, self._rows(node, kept))
        elif dim == 1:
            self._columns(node, kept)
        elif node.target == aten.add.Tensor and any(n in self.sums for n in node.all_input_nodes):
            self._residual(node)
        elif node.target == aten.slice.Tensor and args_of(node)[0] in self.parts:
            self._slice(node)
        elif node.target == aten.cat.default and all(n.target == ops.attention for n in args_of(node)[0]):
            # Heads that see the image, and heads that do not: `foveate.ir.heads` puts them together.
            one, *rest = args_of(node)[0]
            if len(rest) == 1:
                self.parts[node] = Parts(_dim(node, args_of(node)[1]), (one, rest[0]))
        elif any(n in self.parts for n in node.all_input_nodes):
            self._through(node)

    def _rows(self, node: fx.Node, kept: int) -> tuple[fx.Node, fx.Node]:
        x, weight, *bias = args_of(node)

        def part(start: int, stop: int, about: NodeInfo) -> fx.Node:
            cut = [None if w is None else self._part_of(w, 0, start, stop, node) for w in (weight, *bias)]
            return self.edit.call(node.target, x, *cut, about=about)

        width = int(shape(weight)[0])
        return part(0, kept, info(node)), part(kept, width, _rest(node))

    def _columns(self, node: fx.Node, kept: int) -> None:
        x, weight, *bias = args_of(node)
        found = self.parts.get(x)
        if found is None or found.axis != len(shape(x)) - 1 or shape(found.nodes[0])[-1] != kept:
            return
        width = int(shape(weight)[1])
        one, rest = (self._part_of(weight, 1, *bounds, node) for bounds in ((0, kept), (kept, width)))
        self.sums[node] = (
            self.edit.call(node.target, found.nodes[0], one, *bias, about=info(node)),
            self.edit.call(node.target, found.nodes[1], rest, about=_rest(node)),
        )

    def _residual(self, node: fx.Node) -> None:
        """x + (a + b) as (x + a) + b, so that x + a is what visual tokens do too."""
        a, b, *more = args_of(node)
        if more or node.kwargs or (a in self.sums and b in self.sums):
            return
        one, rest = self.sums[a if a in self.sums else b]
        shared = self.edit.call(node.target, *(one if n in self.sums else n for n in (a, b)), about=info(node))
        self.edit.replace(node, self.edit.call(node.target, shared, rest, about=_rest(node)))

    def _slice(self, node: fx.Node) -> None:
        source, dim, start, stop, *step = args_of(node)
        parts = self.parts[source]
        if _dim(source, dim) != parts.axis:
            self._through(node)
            return
        sizes = [int(shape(n)[parts.axis]) for n in parts.nodes]
        stop = min(stop, sum(sizes))
        for part, end, size in zip(parts.nodes, accumulate(sizes), sizes, strict=True):
            first, last = start - (end - size), stop - (end - size)
            if not step and 0 <= first <= last <= size:
                whole = (first, last) == (0, size)
                new = part if whole else self._call(aten.slice.Tensor, node, part, dim, first, last)
                self.edit.replace(node, new)
                return

    def _through(self, node: fx.Node) -> None:
        """An op on each part, where it works on each part alone."""
        found = [self.parts[n] for n in node.all_input_nodes if n in self.parts]
        axis = _axis_through(node, self.parts)
        if axis is None:
            return
        made = []
        for i, about in enumerate((info(node), _rest(node))):
            args, kwargs = map_arg((node.args, node.kwargs), self._part(i))
            if node.target == aten.unflatten.int and _dim(args[0], args[1]) == found[0].axis:
                inner = _product(args[2][1:])
                width = int(shape(args[0])[found[0].axis])
                if width % inner:
                    return
                args = (*args[:2], [width // inner, *args[2][1:]])
            made.append(self.edit.call(node.target, *args, about=about, **kwargs))
        self.parts[node] = Parts(axis, (made[0], made[1]))

    def _part(self, place: int) -> Callable[[fx.Node], fx.Node]:
        """A value's part of that number; what is not in parts as it is."""
        return lambda node: self.parts[node].nodes[place] if node in self.parts else node

    def _part_of(self, weight: fx.Node, dim: int, start: int, stop: int, node: fx.Node) -> fx.Node:
        about = info(node).with_(stream="none", by=self.edit.by, twin="", origin=(node.name,))
        return self.edit.call(aten.slice.Tensor, weight, dim, start, stop, about=about)

    def _call(self, op: Any, node: fx.Node, *args: Any) -> fx.Node:
        return self.edit.call(op, *args, about=info(node).with_(by=self.edit.by, twin="", origin=(node.name,)))


def _rest(node: fx.Node) -> NodeInfo:
    """About what text does alone: visual tokens have nothing of the kind."""
    return info(node).with_(by="share", twin="", origin=(node.name,))


def _cuts(graph: fx.Graph) -> dict[fx.Node, tuple[int, int]]:
    """Text linear -> the axis of its weight (0 rows, 1 columns) of which visual tokens use the first so many."""
    same = equal_nodes(graph)
    linears = [n for n in graph.nodes if n.target == aten.linear.default]
    text: dict[str, list[fx.Node]] = {}
    for node in linears:
        if info(node).stream == "text" and info(node).twin:
            text.setdefault(info(node).twin, []).append(node)
    cuts = {}
    for node in linears:
        weight = same[args_of(node)[1]]
        if info(node).stream != "visual" or weight.target != aten.slice.Tensor:
            continue
        source, dim, start, stop = args_of(weight)
        for twin in text.get(info(node).twin, []):
            if start == 0 and same[args_of(twin)[1]] is same[source]:
                cuts[twin] = (dim, int(stop))
    return cuts


def _dim(node: fx.Node, dim: int) -> int:
    return dim % len(shape(node))


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _axis_through(node: fx.Node, parts: dict[fx.Node, Parts]) -> int | None:
    """On which axis the result is in parts, if the op works on each part alone; None if it does not."""
    rank = len(shape(node)) if isinstance(node.meta["val"], Tensor) else 0
    sources = [n for n in node.all_input_nodes if n in parts]
    source, axis = sources[0], parts[sources[0]].axis
    args = args_of(node)
    if node.target in ELEMENTWISE:
        back = {parts[n].axis - len(shape(n)) for n in sources}
        sizes = {tuple(int(shape(p)[parts[n].axis]) for p in parts[n].nodes) for n in sources}
        place = back.pop()
        others = [n for n in node.all_input_nodes if n not in parts]
        broadcast = all(len(shape(n)) + place < 0 or shape(n)[place] == 1 for n in others)
        return rank + place if not back and len(sizes) == 1 and broadcast else None
    if node.target == aten.cat.default:
        joined = _dim(node, args[1]) if len(args) > 1 else 0
        alike = all(n in parts and parts[n].axis == axis for n in args[0])
        return axis if alike and joined != axis else None
    rule = _AXES.get(node.target)
    return None if rule is None or len(sources) > 1 or source is not args[0] else rule(node, axis)


def _unflatten(node: fx.Node, axis: int) -> int:
    source, dim, sizes = args_of(node)
    return axis + len(sizes) - 1 if _dim(source, dim) < axis else axis


def _flatten(node: fx.Node, axis: int) -> int | None:
    source, *dims = args_of(node)
    start, stop = (_dim(source, d) for d in (*dims, *(0, -1)[len(dims) :]))
    return None if start < axis <= stop else axis if axis <= start else axis - (stop - start)


def _transpose(node: fx.Node, axis: int) -> int:
    source, *dims = args_of(node)
    a, b = (_dim(source, d) for d in dims)
    return {a: b, b: a}.get(axis, axis)


def _unsqueeze(node: fx.Node, axis: int) -> int:
    return axis + 1 if args_of(node)[1] % len(shape(node)) <= axis else axis


def _elsewhere(node: fx.Node, axis: int) -> int | None:
    source, dim, *_ = args_of(node)
    return None if _dim(source, dim) == axis else axis


def _norm(node: fx.Node, axis: int) -> int | None:
    source, normalized, *_ = args_of(node)
    return axis if axis < len(shape(source)) - len(normalized) else None


_AXES: dict[Any, Callable[[fx.Node, int], int | None]] = {
    aten.unflatten.int: _unflatten,
    aten.flatten.using_ints: _flatten,
    aten.transpose.int: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.slice.Tensor: _elsewhere,
    aten.rms_norm.default: _norm,
}
