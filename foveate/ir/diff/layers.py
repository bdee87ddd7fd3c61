"""Graphs of a snapshot made ready for comparison: nodes by layer and cell, their arguments resolved.

A cell is what one stream does for one role, such as the visual `mlp.gate_proj`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from foveate.ir.snapshot.folding import PREVIOUS

INPUTS = -1
"""The layer that a graph's inputs count to."""

RETURN = "return "
"""Start of the op of what stands for a part of the graph's result; the rest is the part's name."""

MANY = 64
"""A value that comes from more cells than this comes from everywhere."""

_TOKEN = re.compile(r'"[^"]*"|(?<![\w.])(?:prev\.)?[A-Za-z_]\w*(?:\{l\})?(?![\w.({=])')
_CONSTANTS = {"None", "True", "False", "inf", "nan"}


class Cell(NamedTuple):
    """Where a node belongs."""

    stream: str
    role: str


@dataclass(eq=False)
class Node:
    """A node of a section: `template` is its call with a blank for each value it reads, `refs` are those values."""

    name: str
    call: str
    stream: str
    role: str
    by: str
    value: str
    place: int
    op: str = field(init=False)
    template: str = field(init=False)
    refs: tuple[str, ...] = field(init=False)
    cell: Cell = field(init=False)

    @classmethod
    def of(cls, texts: Sequence[str], place: int) -> Node:
        """From a snapshot's line, at its place in the section."""
        name, call, stream, role, by, value = texts
        return cls(name, call, stream, role, by, value, place)

    def __post_init__(self) -> None:
        self.op, _, arguments = self.call.partition("(")
        refs = []

        def blank(found: re.Match[str]) -> str:
            text = found[0]
            if text.startswith('"') or text in _CONSTANTS or self.op == "input":
                return text
            refs.append(text)
            return "_"

        self.template = _TOKEN.sub(blank, arguments)
        self.refs = tuple(refs)
        self.cell = Cell(self.stream, self.role)

    @property
    def line(self) -> str:
        """The node for a reader."""
        if self.is_result:
            return f"{self.name} = {self.call.removeprefix(self.op)}"
        return f"{self.name} = {self.call}" + (f" ; {self.value}" if self.value else "")

    @property
    def short_op(self) -> str:
        """`aten.linear.default` -> `linear`."""
        parts = self.op.split(".")
        return parts[1] if len(parts) > 1 else parts[0]

    @property
    def is_result(self) -> bool:
        """Whether it stands for a part of what the graph returns."""
        return self.op.startswith(RETURN)

    @property
    def is_weight(self) -> bool:
        """Whether it is a part of a weight."""
        return not self.refs and self.short_op == "slice" and self.template.startswith("weight(")


@dataclass(eq=False)
class Layer:
    """The nodes of one or more equal layers, by name and by cell; `returns` are its part of the graph's result."""

    nodes: list[Node]
    names: dict[str, Node] = field(init=False)
    cells: dict[Cell, list[Node]] = field(init=False)
    lineage: dict[Node, frozenset[Cell | str]] = field(init=False)

    def __post_init__(self) -> None:
        self.names = {node.name: node for node in self.nodes}
        self._place_weights()
        self.cells = {}
        for node in self.nodes:
            self.cells.setdefault(node.cell, []).append(node)
        self.lineage = {}
        for node in self.nodes:
            self.lineage[node] = self._lineage(node)

    def _lineage(self, node: Node) -> frozenset[Cell | str]:
        """Which other cells a node's value comes from: tells the rotation of the query from that of the key."""
        found: set[Cell | str] = set()
        for ref in node.refs:
            source = self.names.get(ref)
            if source is None:
                found.add(PREVIOUS if ref.startswith(PREVIOUS) else "")
            elif source.cell != node.cell:
                found.add(source.cell)
            else:
                found |= self.lineage.get(source, frozenset())
        return frozenset(found) if len(found) <= MANY else frozenset({"many"})

    def _place_weights(self) -> None:
        """A slice of a weight belongs to the one cell that reads it."""
        readers: dict[str, set[Cell]] = {}
        for node in self.nodes:
            for ref in node.refs:
                readers.setdefault(ref, set()).add(node.cell)
        for node in self.nodes:
            if node.is_weight and node.stream == "none" and len(readers.get(node.name, ())) == 1:
                (node.cell,) = readers[node.name]


@dataclass(eq=False)
class Graph:
    """A graph of a snapshot by layer; layers that are equal are one object.

    moved: the number that what follows the last layer has here -> its own number.
    """

    layers: dict[int, Layer]
    far: dict[str, tuple[int, Node]]
    moved: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, data: dict[str, Any], end: int = -1, common: int = -1) -> Graph:
        """From the snapshot's data. What follows the last layer, as layer `end`, is to have the number `common`."""
        moves = {common: end} if end >= 0 and end == max((s["layers"][1] for s in data["sections"]), default=-1) else {}
        layers = _layers(data, {own: number for number, own in moves.items()})
        far: dict[str, tuple[int, Node]] = {}
        for number, layer in layers.items():
            for node in layer.nodes:
                far.setdefault(node.name, (number, node))
        return cls(layers, far, moves)

    def resolve(self, ref: str, layer: int) -> tuple[int, Node] | None:
        """Layer and node that a name stands for where `layer` reads it; None for a name that stands for nothing."""
        if ref.startswith(PREVIOUS):
            number = self.moved.get(layer, layer) - 1
            before = self.layers.get(number)
            node = before.names.get(ref.removeprefix(PREVIOUS)) if before else None
            return None if node is None else (number, node)
        own = self.layers[layer].names.get(ref)
        return (layer, own) if own is not None else self.far.get(ref)

    @property
    def count(self) -> int:
        """Nodes of all layers."""
        return sum(not node.is_result for layer in self.layers.values() for node in layer.nodes)


def _layers(data: dict[str, Any], moves: dict[int, int]) -> dict[int, Layer]:
    sections: dict[int, list[list[str]]] = {INPUTS: list(data["inputs"])}
    for section in data["sections"]:
        first, last = section["layers"]
        for own in range(first, last + 1):
            number = moves.get(own, own)
            sections[number] = sections[number] + section["nodes"] if number == INPUTS else section["nodes"]
    results = _results(data["returns"], max(sections))
    made: dict[Any, Layer] = {}
    layers = {}
    for number in sorted({*sections, *results}):
        nodes, returned = sections.get(number, []), results.get(number, [])
        key = (id(nodes), tuple(map(tuple, returned)))
        if key not in made:
            made[key] = Layer([Node.of(texts, place) for place, texts in enumerate([*nodes, *returned])])
        layers[number] = made[key]
    return layers


def _results(returns: dict[str, Any], last: int) -> dict[int, list[list[str]]]:
    """What a graph returns, a node for each part, by layer: keys and values belong to theirs, the rest to the last."""
    found: dict[int, list[list[str]]] = {}
    for row in returns.get("kv", ()):
        first, end = row["layers"]
        values = row["values"]
        pairs = {"visual": values[:2], "text": values[2:]} if any(values[2:]) else {"evicted": values[:2]}
        parts = pairs if len(values) == 4 else {"layer": values}
        for number in range(first, end + 1):
            for stream, part in parts.items():
                if any(part):
                    found.setdefault(number, []).append(_result(f"kv_{stream}", part))
    for name, value in returns.items():
        if name == "kv":
            continue
        entries = {f"{name}_{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
        for label, entry in entries.items():
            found.setdefault(last, []).append(_result(label, entry if isinstance(entry, list) else [entry]))
    return found


def _result(name: str, values: Sequence[Any]) -> list[str]:
    # Nested results are rare; their text still tells one from another.
    texts = ", ".join(str(v) for v in values)
    return [RETURN + name, f"{RETURN}{name}({texts})", "none", "output", "", ""]
