"""One graph of two snapshots compared, layer by layer: which nodes of which cells differ, and what made them so."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from foveate.ir.diff.align import Rows, align
from foveate.ir.diff.layers import Cell, Graph, Layer, Node
from foveate.ir.diff.words import Change, changes, parse_value

CONTRACTING = ("linear", "matmul")
"""Ops whose last input axis does not show in their value."""

Causes = dict[Change, frozenset[str]]
"""Changed sizes of a value -> the passes behind each, as far as nodes tell."""


@dataclass
class Pair:
    """A node of A and its counterpart in B, which computes something else; `reads` are the first values that differ."""

    a: Node
    b: Node
    causes: Causes
    reads: tuple[str, str] | None


@dataclass(eq=False)
class CellDiff:
    """A cell of both programs. gone: B has no visual work left in this layer; ends: in this or the next one."""

    cell: Cell
    rows: Rows
    pairs: list[Pair]
    gone: bool
    ends: bool

    @property
    def a(self) -> list[Node]:
        """A's nodes."""
        return [x for x, _ in self.rows if x]

    @property
    def b(self) -> list[Node]:
        """B's nodes."""
        return [y for _, y in self.rows if y]

    @property
    def added(self) -> list[Node]:
        """B's nodes without a counterpart."""
        return [y for x, y in self.rows if y and not x]

    @property
    def removed(self) -> list[Node]:
        """A's nodes without a counterpart."""
        return [x for x, y in self.rows if x and not y]

    @property
    def state(self) -> str:
        """`same`, `changed`, `removed` or `added`."""
        if not self.b:
            return "removed"
        if not self.a:
            return "added"
        return "changed" if self.pairs or self.added or self.removed else "same"


@dataclass
class LayerDiff:
    """A layer of both programs; `causes` by the places of B's nodes."""

    cells: list[CellDiff]
    causes: dict[int, Causes] = field(default_factory=dict)

    @property
    def key(self) -> Any:
        """Equal for layers whose differences are equal."""
        cells = [
            (
                c.cell,
                c.gone,
                c.ends,
                tuple(map(id, c.a)),
                tuple(map(id, c.b)),
                [(id(p.a), id(p.b), p.reads) for p in c.pairs],
            )
            for c in self.cells
        ]
        return cells, self.causes


def compare(a: Graph, b: Graph, passes: Iterable[str]) -> dict[int, LayerDiff]:
    """Every layer of either graph; `passes` are the names of those that may have made a node."""
    return _Comparison(a, b, frozenset(passes)).run()


class _Comparison:
    def __init__(self, a: Graph, b: Graph, passes: frozenset[str]) -> None:
        self.a, self.b, self.passes = a, b, passes
        self.aligned: dict[tuple[int, int], list[tuple[Cell, Rows]]] = {}
        self.partners: dict[tuple[int, int], dict[Node, Node]] = {}
        self.done: dict[int, LayerDiff] = {}

    def run(self) -> dict[int, LayerDiff]:
        # What is found in a layer depends on its nodes, those of its neighbours, and what was found in the one before
        # (values from further away have the same names everywhere). Layers repeat: most of it is known already.
        known: dict[Any, LayerDiff] = {}
        for number in sorted({*self.a.layers, *self.b.layers}):
            near = [id(g.layers.get(n)) for g in (self.a, self.b) for n in (number - 1, number, number + 1)]
            before = self.done.get(number - 1)
            key = (*near, id(before))
            if key not in known:
                made = self._layer(number)
                known[key] = before if before is not None and made.key == before.key else made
            self.done[number] = known[key]
        return self.done

    def _layer(self, number: int) -> LayerDiff:
        b = self.b.layers.get(number)
        found = LayerDiff([])
        partner = {y: x for _, rows in self._rows(number) for x, y in rows if y}
        pairs: dict[Node, Pair] = {}
        for y in b.nodes if b else ():
            x = partner[y]
            if x is not None and not self._same(x, y, number):
                pairs[y] = self._pair(x, y, number, found)
        gone = self._gone(number)
        ends = gone or self._gone(number + 1)
        for cell, rows in self._rows(number):
            found.cells.append(CellDiff(cell, rows, [pairs[y] for _, y in rows if y in pairs], gone, ends))
        return found

    def _gone(self, number: int) -> bool:
        return _works(self.a.layers.get(number), "visual") and not _works(self.b.layers.get(number), "visual")

    def _rows(self, number: int) -> list[tuple[Cell, Rows]]:
        a, b = self.a.layers.get(number), self.b.layers.get(number)
        key = (id(a), id(b))
        if key not in self.aligned:
            self.aligned[key] = align(a, b)
            self.partners[key] = {x: y for _, rows in self.aligned[key] for x, y in rows if x and y}
        return self.aligned[key]

    def _same(self, x: Node, y: Node, number: int) -> bool:
        """Whether two nodes compute the same from values that correspond."""
        if (x.op, x.template, x.value, len(x.refs)) != (y.op, y.template, y.value, len(y.refs)):
            return False
        return all(self._correspond(r, s, number) for r, s in zip(x.refs, y.refs))

    def _correspond(self, r: str, s: str, number: int) -> bool:
        p, q = self.a.resolve(r, number), self.b.resolve(s, number)
        if p is None or q is None:
            return p is q and r == s
        if p[0] != q[0]:
            return False
        self._rows(p[0])
        return self.partners[id(self.a.layers[p[0]]), id(self.b.layers[p[0]])].get(p[1]) is q[1]

    def _pair(self, x: Node, y: Node, number: int, found: LayerDiff) -> Pair:
        causes = {change: self._cause(change, y, number, found) for change in changes(x, y)}
        found.causes[y.place] = causes
        if y.short_op in CONTRACTING and y.refs:
            width = self._causes_of(y.refs[0], number, found)
            causes = {**{c: by for c, by in width.items() if c.last}, **causes}
        return Pair(x, y, causes, self._reads(x, y, number))

    def _reads(self, x: Node, y: Node, number: int) -> tuple[str, str] | None:
        for r, s in zip(x.refs, y.refs):
            if not self._correspond(r, s, number):
                p, q = self.a.resolve(r, number), self.b.resolve(s, number)
                return (_label(p[1], self.a, p[0]) if p else r, _label(q[1], self.b, q[0]) if q else s)
        return None

    def _causes_of(self, ref: str, number: int, found: LayerDiff) -> Causes:
        place = self.b.resolve(ref, number)
        of = found if place and place[0] == number else self.done.get(place[0]) if place else None
        return of.causes.get(place[1].place, {}) if of and place else {}

    def _cause(self, change: Change, y: Node, number: int, found: LayerDiff) -> frozenset[str]:
        """The passes behind a changed size: those behind the same change of what is read, else those that made it."""
        inherited = [by for ref in y.refs for c, by in self._causes_of(ref, number, found).items() if change.follows(c)]
        if inherited:
            return frozenset().union(*inherited)
        sources = [place[1] for ref in y.refs if (place := self.b.resolve(ref, number))]
        makers = {y.by, *(z.by for z in sources if change.after in parse_value(z.value)[1])}
        return frozenset(makers) & self.passes


def _label(node: Node, graph: Graph, number: int) -> str:
    """A value for a reader: an input by its name, others by the op that made them."""
    if node.op == "item" and node.refs and (source := graph.resolve(node.refs[0], number)):
        return source[1].short_op
    return node.name if node.op == "input" else node.short_op


def _works(layer: Layer | None, stream: str) -> bool:
    """Whether a layer computes anything for a stream."""
    return layer is not None and any(n.stream == stream and n.op != "input" for n in layer.nodes)
