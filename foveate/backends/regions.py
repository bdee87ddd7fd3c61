"""A graph cut into its layers, so that layers which do the same are compiled once, however deep the model is.

    graph                                         regions
    h1 = layer0(h0, w0);  h2 = layer1(h1, w1)     f0(h0, w0) -> h1;  f1(h1, w1) -> h2     f1 serves layers 1, 2, 3, ...

Weights are arguments of a region like any other value, so two layers differ only if they compute something else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, fx

from foveate.backends.base import Inputs, Runner
from foveate.ir.program import Program, info, outputs
from foveate.ir.rewriter import map_arg


@dataclass(frozen=True)
class Region:
    """Part of a graph as a function: `inputs` are the values it takes, `results` those that later regions need.

    body: the ops, in which inputs and values are numbers and not names.
    """

    graph: fx.Graph
    inputs: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    body: str

    @property
    def key(self) -> str:
        """Equal for regions of a program that compute the same."""
        return "\n".join([*map(_described, self.inputs), self.body])


Compiled = Callable[..., tuple[Any, ...]]
"""A region as a function of its inputs."""


def run_by_regions(program: Program, graph: fx.Graph, make: Callable[[Region], Compiled], alike: int = 1) -> Runner:
    """A runner that calls the regions of a graph in turn; `make` is asked once for regions with equal keys.

    alike: see `regions`.
    """
    functions: dict[str, Compiled] = {}
    steps = []
    for region in regions(graph, alike):
        key = region.key
        if key not in functions:
            functions[key] = make(region)
        steps.append((functions[key], region.inputs, region.results))
    given = [n for n in graph.nodes if n.op == "placeholder"]
    weights = {n: program.weights.get(str(n.target)) for n in graph.nodes if n.op == "get_attr"}
    returned = outputs(graph)
    last = {value: place for place, (_, taken, _) in enumerate(steps) for value in taken}
    kept: set[fx.Node] = set()
    map_arg(returned, lambda n: kept.add(n) or n)  # type: ignore[func-returns-value]  # add in passing

    def run(inputs: Inputs) -> dict[str, Any]:
        values: dict[fx.Node, Any] = {**weights, **{n: inputs[str(n.target)] for n in given}}
        for place, (function, taken, results) in enumerate(steps):
            values.update(zip(results, function(*(values[n] for n in taken)), strict=True))
            for node in taken:
                # What no later region needs is freed, as it would be in one graph.
                if last[node] == place and node not in kept:
                    del values[node]
        result: dict[str, Any] = _filled(returned, values)
        return result

    return run


def regions(graph: fx.Graph, alike: int = 1) -> list[Region]:
    """The layers of a graph, in order; what depends on a later layer belongs to that one.

    Layers that fewer than `alike` of the graph are equal to form one region with such neighbours.
    """
    layer: dict[fx.Node, int] = {}
    members: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            layer[node] = max([info(node).layer, *(layer[n] for n in node.all_input_nodes if n in layer)])
            members.setdefault(layer[node], []).append(node)
    found = {number: _region(members[number], number, layer) for number in sorted(members)}
    count = Counter(region.key for region in found.values())
    joined: dict[int, list[fx.Node]] = {}
    for _, numbers in groupby(found, lambda n: n if count[found[n].key] >= alike else None):
        first, *others = numbers
        joined[first] = members[first] + [node for number in others for node in members[number]]
        layer.update(dict.fromkeys(joined[first], first))
    return [_region(nodes, number, layer) for number, nodes in joined.items()]


def _region(nodes: list[fx.Node], number: int, layer: dict[fx.Node, int]) -> Region:
    new = fx.Graph()
    inside: dict[fx.Node, fx.Node] = {}
    # All inputs stand in front, in the order of their first use.
    inputs = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if layer.get(n) != number))
    for source in inputs:
        inside[source] = new.placeholder(f"x{len(inside)}")
    for node in nodes:
        inside[node] = new.node_copy(node, inside.__getitem__)
    results = [n for n in nodes if any(layer.get(u) != number for u in n.users)]
    new.output(tuple(inside[n] for n in results))
    names = {n: _Name(f"%{place}") for place, n in enumerate(inside)}
    lines = [f"{n.target} {map_arg((n.args, n.kwargs), names.__getitem__)}" for n in nodes]
    lines.append(" ".join(names[n] for n in results))
    return Region(new, tuple(inputs), tuple(results), "\n".join(lines))


class _Name(str):
    """Prints without quotes, so that a value is not mistaken for a constant."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _described(source: fx.Node) -> str:
    value = source.meta["val"]
    kind = f"{value.dtype} {tuple(value.shape)} {value.device}" if isinstance(value, Tensor) else "int"
    return f"{'weight' if source.op == 'get_attr' else 'value'} {kind}"


def _filled(returned: Any, values: dict[fx.Node, Any]) -> Any:
    if isinstance(returned, dict):
        return {name: _filled(value, values) for name, value in returned.items()}
    if isinstance(returned, (list, tuple)):
        return [_filled(value, values) for value in returned]
    return values[returned] if isinstance(returned, fx.Node) else returned
