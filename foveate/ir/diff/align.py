"""Two layers side by side: cells of one and the other, and inside each cell the nodes that correspond.

Nodes are aligned in order, by what they compute; neither their names nor what stands between cells matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any

from foveate.ir.diff.layers import Cell, Layer, Node
from foveate.ir.snapshot.folding import PREVIOUS

MOST = 40_000
"""Pairs of nodes of one cell that are weighed against each other; beyond it, nodes are aligned by place."""

Rows = list[tuple[Node | None, Node | None]]
"""Nodes of two programs side by side."""


Key = Callable[[Node, Layer], Any]
"""What two nodes must have in common to be aligned."""


def align(a: Layer | None, b: Layer | None) -> list[tuple[Cell, Rows]]:
    """Cells of two layers, in the order of reading, each with its nodes side by side."""
    cells = _merged(list(a.cells) if a else [], list(b.cells) if b else [])
    return [
        (cell, _side_by_side(a, b, a.cells.get(cell, []) if a else [], b.cells.get(cell, []) if b else []))
        for cell in cells
    ]


def _merged(a: list[Cell], b: list[Cell]) -> list[Cell]:
    """Both orders in one: what only `a` has follows what it follows there."""
    common = set(b)
    behind: dict[Cell | None, list[Cell]] = {}
    last: Cell | None = None
    for cell in a:
        if cell in common:
            last = cell
        else:
            behind.setdefault(last, []).append(cell)
    return [*behind.get(None, []), *(c for cell in b for c in (cell, *behind.get(cell, [])))]


def _side_by_side(a: Layer | None, b: Layer | None, left: list[Node], right: list[Node]) -> Rows:
    """Two lists of nodes aligned: what is alike in all but names; in between what does the same op to the same
    inputs; and what is left by op alone.
    """
    return _rows(left, right, list(_KEYS), a, b)


def _rows(left: list[Node], right: list[Node], keys: list[Key], a: Layer | None, b: Layer | None) -> Rows:
    if not keys and len(left) == len(right) == 1 and len(left[0].refs) == len(right[0].refs):
        return [(left[0], right[0])]  # another op in the same place
    if not keys or not left or not right or a is None or b is None:
        return [*((node, None) for node in left), *((None, node) for node in right)]
    rows: Rows = []
    for i, j, size, gap in _blocks([keys[0](n, a) for n in left], [keys[0](n, b) for n in right]):
        rows += _rows(left[gap[0] : i], right[gap[1] : j], keys[1:], a, b)
        rows += zip(left[i : i + size], right[j : j + size])
    return rows


def _blocks(a: Sequence[Any], b: Sequence[Any]) -> list[tuple[int, int, int, tuple[int, int]]]:
    """Equal stretches (start in a, start in b, length), each with where the gap before it starts; the last is empty."""
    if list(a) == list(b):
        found = [(0, 0, len(a))]
    elif len(a) * len(b) > MOST:
        same = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        found = [(0, 0, same)]
    else:
        matcher = SequenceMatcher(None, a, b, autojunk=False)
        found = [(m.a, m.b, m.size) for m in matcher.get_matching_blocks()]
    if found[-1] != (len(a), len(b), 0):
        found.append((len(a), len(b), 0))
    ends = [(0, 0), *((i + size, j + size) for i, j, size in found)]
    return [(*block, end) for block, end in zip(found, ends)]


def _kind(node: Node, layer: Layer) -> tuple[Any, ...]:
    """What a node is apart from names: its op, constants, value, what kinds of values it reads and whence."""
    reads = []
    for ref in node.refs:
        source = layer.names.get(ref)
        reads.append((source.cell, source.op) if source else ref.startswith(PREVIOUS))
    return (node.op, node.template, node.value, tuple(reads), layer.lineage[node])


_KEYS: tuple[Key, ...] = (_kind, lambda node, layer: (node.op, layer.lineage[node]), lambda node, layer: node.op)
"""What nodes are aligned by, the most telling first."""
