"""What changed in a cell, in a few words: `11008 -> 5504`, `32 -> 16 heads`, `text sees text only`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from foveate.ir.diff.layers import RETURN, Node

MOST = 4
"""Ops or changes of one kind that are named; further ones are counted."""

_ATTENTION = "foveate.attention.default"
_LAYOUT = re.compile(r'"([a-z]+):([a-z]+)"')
_STREAMS = {"v": "visual", "t": "text", "s": "the sequence"}

# Ops that only arrange what others compute: not worth a word where something else changed too.
_ARRANGING = {"slice", "cat", "item", "transpose", "unsqueeze", "unflatten", "flatten", "expand", "select", "to"}


class Change(NamedTuple):
    """One size or type of a value that changed, and whether it is the last axis."""

    before: str
    after: str
    last: bool

    @property
    def tokens(self) -> bool:
        """Whether it is a number of tokens, which is no plain number."""
        return not (self.before.isdecimal() and self.after.isdecimal())

    def follows(self, other: Change) -> bool:
        """Whether this is the other change again: the same, or as large in proportion, as 32 -> 16 and 64 -> 32 are."""
        if self.tokens or other.tokens:
            return (self.before, self.after) == (other.before, other.after)
        return int(self.before) * int(other.after) == int(self.after) * int(other.before)


@dataclass(frozen=True)
class Heads:
    """What tells heads from other widths: roles of the attention projections, and the size of a head."""

    projections: frozenset[str]
    size: int

    @classmethod
    def of(cls, model: dict[str, Any]) -> Heads:
        """From a snapshot's `model`."""
        roles = {model["roles"][short] for short in ("q", "k", "v", "o") if short in model["roles"]}
        return cls(frozenset(roles), model["head_dim"])

    def words(self, change: Change, role: str) -> str | None:
        """`32 -> 16 heads`, if the change is one of heads."""
        around = {projection.rpartition(".")[0] for projection in self.projections} - {""}
        if role not in self.projections | around | {"kv"}:
            return None
        a, b = int(change.before), int(change.after)
        if not change.last and role not in self.projections:
            return f"{a} -> {b} heads"
        # Outputs of a projection, or rows of its weight: as many as its heads are wide.
        return (
            f"{a // self.size} -> {b // self.size} heads"
            if self.size and not (a % self.size or b % self.size)
            else None
        )


def changes(a: Node, b: Node) -> set[Change]:
    """Sizes and the type of a node's value that differ; empty for values of different rank, which are not compared."""
    (kind_a, sizes_a), (kind_b, sizes_b) = parse_value(a.value), parse_value(b.value)
    found = {Change(kind_a, kind_b, False)} if kind_a != kind_b else set()
    if len(sizes_a) != len(sizes_b):
        return found
    last = len(sizes_a) - 1
    return found | {Change(x, y, i == last) for i, (x, y) in enumerate(zip(sizes_a, sizes_b)) if x != y}


def parse_value(value: str) -> tuple[str, list[str]]:
    """dtype and sizes of `float32[batch, 3]`."""
    kind, _, inside = value.removesuffix("]").partition("[")
    sizes, depth, start = [], 0, 0
    for place, letter in enumerate(inside):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            sizes.append(inside[start:place].strip())
            start = place + 1
    return kind, [*sizes, inside[start:].strip()] if inside else []


def words_for_change(change: Change, role: str, heads: Heads) -> str:
    """A change of one size or type."""
    if not change.tokens:
        return heads.words(change, role) or f"{change.before} -> {change.after}"
    if change.before.isidentifier() and change.after.isidentifier() and "token" not in change.before:
        return f"{change.before} -> {change.after}"
    return f"{change.before} -> {change.after} tokens"


def words_for_attention(a: Sequence[Node], b: Sequence[Node]) -> str | None:
    """Who sees whom, where that differs: `text sees text only`, `text: 16 heads see text only, 16 visual and text`."""
    before, after = _layouts(a), _layouts(b)
    if not before or not after or before == after:
        return None
    seen = [(who, keys, n) for (who, keys), n in after.items()]
    old = {keys for _, keys in before}
    if len({keys for _, keys, _ in seen}) == 1:
        who, keys, _ = seen[0]
        return None if old == {keys} else f"{who} sees {_seen(keys)}"
    who = seen[0][0]
    return f"{who}: " + ", ".join(f"{n} heads see {_seen(keys)}" for _, keys, n in sorted(seen, key=lambda s: s[1]))


def _layouts(nodes: Iterable[Node]) -> dict[tuple[str, str], int]:
    """(queries, kinds of keys) -> heads, over the attention calls of a cell."""
    found: Counter[tuple[str, str]] = Counter()
    for node in nodes:
        layout = _LAYOUT.search(node.template) if node.op == _ATTENTION else None
        if layout:
            sizes = parse_value(node.value)[1]
            heads = int(sizes[2]) if len(sizes) == 4 and sizes[2].isdecimal() else 0
            found[_names(layout[1]), "".join(sorted(set(layout[2])))] += heads
    return dict(found)


def _names(letters: str) -> str:
    return " and ".join(_STREAMS.get(letter, letter) for letter in dict.fromkeys(letters))


def _seen(keys: str) -> str:
    return _names(keys[::-1]) + (" only" if len(keys) == 1 else "")


def is_attention(node: Node) -> bool:
    """Whether a node is an attention call with a layout."""
    return node.op == _ATTENTION


def words_for_ops(added: Sequence[Node], removed: Sequence[Node], alone: bool) -> list[str]:
    """Ops that came and went; with something else to say (not `alone`), only those that compute."""
    told = []
    for label, nodes in (("added", added), ("removed", removed)):
        shown = list(
            dict.fromkeys(_op(n) for n in nodes if not n.is_result and (alone or n.short_op not in _ARRANGING))
        )
        if shown:
            told.append(f"{label}: {_listed(shown)}")
        told += [_words_for_result(n, label == "added") for n in nodes if n.is_result]
    return told


def words_for_new(nodes: Sequence[Node]) -> list[str]:
    """A cell that was not there before: told by its ops, where they are none that a model has."""
    if any(n.op.startswith("foveate.") and n.op != _ATTENTION for n in nodes):
        return words_for_ops(nodes, [], alone=False)
    results = [_words_for_result(n, True) for n in nodes if n.is_result]
    return results or ["added"]


def _op(node: Node) -> str:
    return f"input {node.name}" if node.op == "input" else node.short_op


def _words_for_result(node: Node, there: bool) -> str:
    name = node.name.removeprefix(RETURN)
    if name == "kv_evicted":
        return f"one block of both streams' keys and values {'cached' if there else 'no longer cached'}"
    if name in ("kv_visual", "kv_text"):
        return f"{name.removeprefix('kv_')} keys and values {'cached' if there else 'no longer cached'}"
    return f"returns {name}" if there else f"no longer returns {name}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST
    return ", ".join(names[:MOST]) + (f" and {more} more" if more > 0 else "")


def words_for_call(a: Node, b: Node) -> str | None:
    """Constants or weights of a call that differ: `top_tokens: 0.5 -> 0.25`."""
    pattern = re.compile(r'"[^"]*"|-?[\w.+-]+')
    before, after = pattern.findall(a.template), pattern.findall(b.template)
    if a.template == b.template:
        return None
    if len(before) != len(after):
        return f"{b.short_op}: other arguments"
    pairs = [(x, y) for x, y in zip(before, after) if x != y]
    if not pairs:
        return f"{b.short_op}: other arguments"
    x, y = pairs[0]
    if x.startswith('"') and "." in x and "." in y:
        return f"weight {_short(x)} -> {_short(y)}"
    return f"{b.short_op}: {x} -> {y}" + (f" and {len(pairs) - 1} more" if len(pairs) > 1 else "")


def _short(path: str) -> str:
    return ".".join(path.strip('"').split(".")[-3:])
