"""The only thing that edits a graph.

A `Rewriter` inserts, replaces and erases; every node it makes gets its symbolic shape at once and its provenance
(`NodeInfo`), and every edit is counted, so that reports and diffs can say what a pass did.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from foveate.errors import TraceError
from foveate.ir.program import NodeInfo, Program, Stream, info, outputs

if TYPE_CHECKING:
    from foveate.ir.statistics import Statistics

Arg = Any
"""What an FX node takes: nodes, numbers, strings, None, dtypes, devices, and lists of them."""


def map_arg(arg: Arg, change: Callable[[fx.Node], Arg]) -> Arg:
    """`arg` with every node in it replaced by `change(node)`."""
    return fx.map_arg(arg, change)


class Rewriter:
    """Edits one graph of a program on behalf of a named step, which may look at statistics of the model."""

    def __init__(self, program: Program, graph: fx.Graph, by: str, statistics: Statistics | None = None) -> None:
        self.program = program
        self.graph = graph
        self.by = by
        self.statistics = statistics
        self.events: Counter[str] = Counter()
        self._names: Counter[str] = Counter()
        self._weights: dict[str, fx.Node] = {}

    @property
    def changed(self) -> bool:
        """Whether anything was inserted, replaced or erased."""
        return sum(self.events.values()) > 0

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """New nodes go in front of `node`."""
        with self.graph.inserting_before(node):
            yield

    @contextmanager
    def after(self, node: fx.Node) -> Iterator[None]:
        """New nodes go right behind `node`; behind all inputs and weights, if it is one."""
        point = node.next
        while point.op in ("placeholder", "get_attr"):
            point = point.next
        with self.graph.inserting_before(point):
            yield

    def call(self, op: Any, *args: Arg, about: NodeInfo, name: str | None = None, **kwargs: Arg) -> fx.Node:
        """Insert a call of an op (a `torch.ops` overload); its shape is computed now, from its arguments' shapes."""
        node = self.graph.create_node("call_function", op, args, kwargs, name=name or self._name(op, about))
        return self._finish(node, about, self._evaluate(op, args, kwargs))

    def item(self, source: fx.Node, place: int, about: NodeInfo, name: str | None = None) -> fx.Node:
        """One of the results of an op that returns several."""
        name = name or self._name(f"item{place}", about)
        node = self.graph.create_node("call_function", operator.getitem, (source, place), {}, name=name)
        return self._finish(node, about, source.meta["val"][place])

    def placeholder(self, name: str, value: Arg, about: NodeInfo) -> fx.Node:
        """An input of the graph; inputs stand first, in the order they were made."""
        anchor = next((n for n in self.graph.nodes if n.op != "placeholder"), None)
        if anchor is None:
            return self._finish(self.graph.placeholder(name), about, self.program.symbols.shared(value))
        with self.before(anchor):
            return self._finish(self.graph.placeholder(name), about, self.program.symbols.shared(value))

    def input(self, name: str, sizes: tuple[str | int, ...], about: NodeInfo, device: Any = None) -> fx.Node:
        """The int64 input of that name, made where the graph has none; device: the weights', if not given."""
        node: fx.Node
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.name == name:
                return node
        place = torch.device(device or self.program.weights.device())
        return self.placeholder(name, self.program.symbols.tensor(*sizes, dtype=torch.int64, device=place), about)

    def weight(self, name: str) -> fx.Node:
        """The weight of that name; one node a graph, in front of everything that computes."""
        known = self._weights.get(name)
        if known is not None and not known._erased:
            return known
        last: fx.Node | None = None
        for node in self.graph.nodes:
            if node.op not in ("placeholder", "get_attr"):
                break
            last = node
            if node.op == "get_attr":
                self._weights[str(node.target)] = node
        if name not in self._weights or self._weights[name]._erased:
            with self.graph.inserting_after(last) if last else self.graph.inserting_before():
                node = self.graph.create_node("get_attr", name, name="w_" + name.replace(".", "_"))
            about = NodeInfo(layer=-1, role=name)
            self._weights[name] = self._finish(node, about, self.program.symbols.like(self.program.weights.get(name)))
        return self._weights[name]

    def output(self, value: dict[str, Arg]) -> fx.Node:
        """Set what the graph returns."""
        node: fx.Node
        for node in self.graph.nodes:
            if node.op == "output":
                node.args = (value,)
                self.events["output"] += 1
                return node
        node = self.graph.output(value)
        node.meta["foveate"] = NodeInfo(layer=self.program.info.layers, role="output", by=self.by)
        return node

    def like(self, node: fx.Node, args: tuple[Arg, ...], stream: Stream | None = None) -> fx.Node:
        """The same op on other arguments, with the same reason for being there."""
        old = info(node)
        about = old.with_(stream=stream or old.stream, by=self.by, origin=(node.name,))
        kwargs: dict[str, Any] = dict(node.kwargs)
        return self.call(node.target, *args, about=about, **kwargs)

    def replace(self, old: fx.Node, new: fx.Node, where: Callable[[fx.Node], bool] | None = None) -> None:
        """Every user of `old` (for which `where` holds) uses `new` instead; `old` stays until `sweep`."""
        old.replace_all_uses_with(new, delete_user_cb=where or (lambda user: user is not new), propagate_meta=False)
        self.events["replaced"] += 1

    def hoist(self, nodes: Iterable[fx.Node], anchor: fx.Node) -> None:
        """Move nodes, in graph order, in front of `anchor`, which has to come after all they need."""
        for node in nodes:
            anchor.prepend(node)
            self.events["moved"] += 1

    def set_args(self, node: fx.Node, args: tuple[Arg, ...]) -> None:
        """Give a node other arguments and recompute its shape."""
        node.args = args
        node.meta["val"] = self._evaluate(node.target, args, node.kwargs)
        self.events["changed"] += 1

    def refresh(self, layer: int | None = None) -> None:
        """Recompute shapes from the inputs on (of one layer's nodes only), after arguments changed size."""
        for node in self.graph.nodes:
            if layer is not None and info(node).layer != layer:
                continue
            if node.op == "call_function" and node.target is operator.getitem:
                node.meta["val"] = node.args[0].meta["val"][node.args[1]]
            elif node.op == "call_function":
                node.meta["val"] = self._evaluate(node.target, node.args, node.kwargs)

    def merge_equal(self) -> None:
        """Compute once what is computed several times from the same values."""
        for node, first in equal_nodes(self.graph).items():
            if node is not first:
                self.replace(node, first)
        self.sweep()

    def sweep(self) -> int:
        """Erase what no output needs, except inputs; says how many nodes went."""
        erased = 0
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op in ("call_function", "get_attr"):
                self.graph.erase_node(node)
                erased += 1
        if erased:
            self.events["erased"] += erased
        return erased

    def _name(self, op: Any, about: NodeInfo) -> str:
        # Names are counted per base, so that the same steps always give the same names.
        stream = "" if about.stream == "none" else f"_{about.stream}"
        what = op if isinstance(op, str) else op._schema.name.rpartition("::")[2]
        base = f"l{about.layer}{stream}_{what}" if about.layer >= 0 else f"pre{stream}_{what}"
        self._names[base] += 1
        return f"{base}_{self._names[base]}"

    def _evaluate(self, op: Any, args: Arg, kwargs: Arg) -> Any:
        try:
            return self.program.symbols.evaluate(op, args, kwargs)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise TraceError(f"{op} does not accept its arguments: {str(error).splitlines()[0]}") from error

    def _finish(self, node: fx.Node, about: NodeInfo, value: Any) -> fx.Node:
        node.meta["foveate"] = about if about.by else about.with_(by=self.by)
        node.meta["val"] = value
        self.events["inserted"] += 1
        return node


def shape(node: fx.Node) -> torch.Size:
    """Symbolic shape of a node's value."""
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value.shape


def nodes_of(
    graph: fx.Graph,
    *,
    stream: Stream | None = None,
    role: str | Iterable[str] | None = None,
    layer: int | None = None,
    op: Any = None,
) -> list[fx.Node]:
    """Computing nodes that match all of what is given, in graph order."""
    roles = None if role is None else {role} if isinstance(role, str) else set(role)
    found: list[fx.Node] = []
    for node in graph.nodes if op is None else graph.find_nodes(op="call_function", target=op):
        if node.op == "call_function":
            about = info(node)
            if (
                (layer is None or about.layer == layer)
                and (roles is None or about.role in roles)
                and (stream is None or about.stream == stream)
            ):
                found.append(node)
    return found


def output_nodes(graph: fx.Graph) -> set[fx.Node]:
    """All nodes a graph returns."""
    found: set[fx.Node] = set()
    map_arg(outputs(graph), lambda n: found.add(n) or n)  # type: ignore[func-returns-value]  # add in passing
    return found


def equal_nodes(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Node -> the first node that computes the same from the same values."""
    first: dict[Any, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op != "call_function":
            same[node] = node
            continue
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: same[n])
        key = (node.target, repr(args), repr(kwargs))
        same[node] = first.setdefault(key, node)
    return same
