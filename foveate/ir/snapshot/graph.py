"""A graph as the plain data of a snapshot: nodes by layer, named so that equal layers are equal text and fold.

    ["visual_linear_5", "aten.linear.default(visual_mul_8, slice_1)", "visual", "mlp.gate_proj", "split", "..."]

Inside a section a name stands for the layer's own value (`l3_visual_linear_5` without its `l3_`), `prev.` for a value
of the layer before. A value that is read further away, or returned, keeps its whole name everywhere. `{l}` is the
number of the layer, in the path of a weight or in the name of an input. Values of one kind are numbered in order.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from torch import fx

from foveate.ir.program import Program, info, outputs
from foveate.ir.rewriter import map_arg
from foveate.ir.snapshot.folding import LAYER, PREVIOUS, fold
from foveate.ir.text import call_text, value_text

FAR = 1 << 20
"""Where the graph's own result is read: after every layer."""


def graph_data(program: Program, graph: fx.Graph) -> dict[str, Any]:
    """`inputs`, `sections` (layers with equal nodes folded) and `returns` of a graph, in its own order."""
    return _Spelling(program, graph).data()


class _Spelling:
    def __init__(self, program: Program, graph: fx.Graph) -> None:
        self.graph = graph
        self.sizes = program.symbols.names()
        self.names = _renumbered(graph)
        self.taken = set(self.names.values())
        self.readers = self._readers()

    def _readers(self) -> dict[fx.Node, set[int]]:
        """Node -> the layers that read it."""
        readers: dict[fx.Node, set[int]] = {n: set() for n in self.graph.nodes}
        for node in self.graph.nodes:
            if node.op == "call_function":
                for source in node.all_input_nodes:
                    readers[source].add(info(node).layer)

        def note(value: Any, layer: int) -> None:
            map_arg(value, lambda n: readers[n].add(layer) or n)  # type: ignore[func-returns-value]  # add in passing

        for name, value in outputs(self.graph).items():
            if name == "kv":
                for layer, entry in enumerate(value):
                    note(entry, layer)
            else:
                note(value, FAR)
        return readers

    def data(self) -> dict[str, Any]:
        layers: dict[int, list[list[str]]] = {}
        inputs = []
        for node in self.graph.nodes:
            if node.op == "placeholder" and info(node).layer < 0:
                inputs.append(self._node(node))
            elif node.op in ("placeholder", "call_function"):
                layers.setdefault(info(node).layer, []).append(self._node(node))
        sections = [{"layers": span, "nodes": nodes} for span, nodes in fold(layers)]
        return {"inputs": inputs, "sections": sections, "returns": self._returns()}

    def _node(self, node: fx.Node) -> list[str]:
        about = info(node)
        call = call_text(node, self.sizes, lambda n: self._spell(n, about.layer))
        return [self._name(node), call, about.stream, about.role, about.by, value_text(node, self.sizes)]

    def _name(self, node: fx.Node) -> str:
        """A node's name in its own layer."""
        layer, name = info(node).layer, self.names[node]
        if layer < 0:
            return name
        if node.op == "placeholder":
            end = f"_{layer}"
            own = self.readers[node] <= {layer} and name.endswith(end)
            return name.removesuffix(str(layer)) + LAYER if own else name
        short = name.removeprefix(f"l{layer}_")
        near = self.readers[node] <= {layer, layer + 1}
        return short if near and short not in self.taken else name

    def _spell(self, node: fx.Node, layer: int) -> str:
        """A node as one of `layer` refers to it."""
        if node.op == "get_attr":
            return f'weight("{weight_path(str(node.target), layer)}")'
        name = self._name(node)
        return name if name == self.names[node] or info(node).layer == layer else PREVIOUS + name

    def _returns(self) -> dict[str, Any]:
        result = dict(outputs(self.graph))
        kv = result.pop("kv", None)
        returns = {name: self._returned(value, FAR) for name, value in result.items()}
        if kv is not None:
            entries = {layer: self._returned(entry, layer) for layer, entry in enumerate(kv)}
            returns["kv"] = [{"layers": span, "values": values} for span, values in fold(entries)]
        return returns

    def _returned(self, value: Any, layer: int) -> Any:
        if isinstance(value, fx.Node):
            return self._spell(value, layer)
        if isinstance(value, dict):
            return {str(name): self._returned(v, layer) for name, v in value.items()}
        return None if value is None else [self._returned(v, layer) for v in value]


def _renumbered(graph: fx.Graph) -> dict[fx.Node, str]:
    """Names with the numbers at their ends counted anew in each layer: what was made and erased again leaves no gap."""
    counts: Counter[tuple[int, str]] = Counter()
    names = {}
    for node in graph.nodes:
        found = re.fullmatch(r"(\w+_)\d+", node.name)
        if node.op == "call_function" and found:
            key = (info(node).layer, found[1])
            counts[key] += 1
            names[node] = f"{found[1]}{counts[key]}"
        else:
            names[node] = node.name
    return names


def weight_path(path: str, layer: int) -> str:
    """A weight's path with `{l}` for its first number, where that is the number of the layer."""
    found = re.search(r"(?<=\.)\d+(?=\.)", path)
    if found is None or found[0] != str(layer):
        return path
    return path[: found.start()] + LAYER + path[found.end() :]
