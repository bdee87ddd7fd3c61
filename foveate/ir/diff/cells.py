"""Compared cells told: their changes in words with the passes behind them, and folded over layers and roles."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from foveate.ir.diff.graphs import CellDiff, LayerDiff
from foveate.ir.diff.words import (
    Heads,
    is_attention,
    words_for_attention,
    words_for_call,
    words_for_change,
    words_for_new,
    words_for_ops,
)
from foveate.ir.snapshot.folding import fold

Phrases = list[tuple[str, list[str]]]
"""Changes in words, each with the passes behind it."""

RESULT = "output"
"""Role of what a graph returns."""


@dataclass(frozen=True)
class Suspects:
    """Passes of both programs by name, in the order in which they ran.

    only: the one that the programs differ in, if it is one: what no node accounts for is its doing. traceless: the
    one that B has more than A and that made no node, if it is one: where the visual stream ends, that ended it.
    known: for a graph derived from another, who did what there: (layer, stream, words) -> passes.
    """

    passes: tuple[str, ...] = ()
    only: str = ""
    traceless: str = ""
    known: Mapping[tuple[int, str, str], list[str]] = field(default_factory=dict)
    _phrases: dict[CellDiff, Phrases] = field(default_factory=dict, repr=False, compare=False)

    def named(self, found: Iterable[str], ends: bool) -> list[str]:
        """Passes among what was found on nodes, or what is left by elimination."""
        names = set(found)
        guess = self.only or (self.traceless if ends else "")
        return [p for p in self.passes if p in names] or [guess] * bool(guess)

    def told(self, layer: LayerDiff, number: int, heads: Heads) -> list[tuple[CellDiff, Phrases]]:
        """The cells of a layer with what changed in each, and the passes behind it."""
        found = []
        for cell in layer.cells:
            stream = cell.cell.stream
            if cell not in self._phrases:  # layers repeat
                self._phrases[cell] = phrases(cell, heads, self)
            texts = self._phrases[cell]
            found.append((cell, [(text, by or self.known.get((number, stream, text), [])) for text, by in texts]))
        return found


@dataclass
class Change:
    """One change of one stream in one or several layers and roles. whole: nothing else of the stream is left."""

    layers: list[int]
    stream: str
    roles: list[str]
    state: str
    what: str
    by: list[str] = field(default_factory=list)
    whole: bool = False

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dict(vars(self))


def sections(layers: Mapping[int, LayerDiff], heads: Heads, suspects: Suspects) -> list[dict[str, Any]]:
    """Layers with their cells as plain data, equal neighbours folded."""
    told = {n: [_cell(*entry, suspects) for entry in suspects.told(layer, n, heads)] for n, layer in layers.items()}
    return [{"layers": span, "cells": cells} for span, cells in fold(told)]


def folded_changes(layers: Mapping[int, LayerDiff], heads: Heads, suspects: Suspects) -> list[Change]:
    """The same for reading: equal phrases of neighbouring layers, and of several roles, are one change."""
    open_: list[Change] = []
    found: list[Change] = []
    for number in sorted(layers):
        going_on = []
        for new in _layer_changes(suspects.told(layers[number], number, heads), suspects):
            old = next((c for c in open_ if _goes_on(c, new)), None)
            if old is None:
                old = replace(new, layers=[number, number])
                found.append(old)
            old.layers[1] = number
            old.roles = list(dict.fromkeys([*old.roles, *new.roles]))
            going_on.append(old)
        open_ = going_on
    return found


def _goes_on(old: Change, new: Change) -> bool:
    """Whether a change of one layer is that of the layer before: it may touch fewer roles, or more."""
    alike = all(getattr(old, name) == getattr(new, name) for name in ("stream", "state", "what", "by", "whole"))
    return alike and (new.whole or set(old.roles) <= set(new.roles) or set(new.roles) <= set(old.roles))


def _layer_changes(told: list[tuple[CellDiff, Phrases]], suspects: Suspects) -> list[Change]:
    groups: dict[tuple[str, str, str], Change] = {}
    for cell, texts in told:
        for what, by in texts:
            key = (cell.cell.stream, cell.state, what)
            change = groups.setdefault(key, Change([0, 0], cell.cell.stream, [], cell.state, what))
            change.roles.append(cell.cell.role)
            change.by = [p for p in suspects.passes if p in {*change.by, *by}]
    states: dict[str, set[str]] = {}
    for cell, _ in told:
        if cell.cell.role != RESULT:
            states.setdefault(cell.cell.stream, set()).add(cell.state)
    for change in groups.values():
        change.whole = change.state in ("removed", "added") and states.get(change.stream) == {change.state}
    return list(groups.values())


def _cell(cell: CellDiff, told: Phrases, suspects: Suspects) -> dict[str, Any]:
    state = cell.state
    return {
        "stream": cell.cell.stream,
        "role": cell.cell.role,
        "state": state,
        "what": "; ".join(text for text, _ in told),
        "by": [p for p in suspects.passes if any(p in by for _, by in told)],
        "a": [node.line for node in cell.a],
        "b": [] if state == "same" else [node.line for node in cell.b],
    }


def phrases(cell: CellDiff, heads: Heads, suspects: Suspects) -> Phrases:
    """What changed in a cell, in words, each with the passes behind it; nothing for cells that are the same."""
    if cell.state == "same":
        return []
    added, removed, pairs = cell.added, cell.removed, cell.pairs
    if cell.state == "removed":
        texts = ["removed"] if cell.cell.role != RESULT else words_for_ops([], removed, alone=True)
        return _with(texts, {n.by for n in removed}, cell, suspects)
    if cell.state == "added":
        return _with(words_for_new(added), {n.by for n in added}, cell, suspects)
    makers = {n.by for n in (*added, *removed, *(p.b for p in pairs))}
    found: dict[str, set[str]] = {}
    seen = words_for_attention(cell.a, cell.b)
    if seen:
        # Says more than that calls came, went or have fewer heads.
        found[seen] = {suspects.traceless} if cell.gone and suspects.traceless else makers
        pairs = [p for p in pairs if not is_attention(p.b)]
        added, removed = ([n for n in nodes if not is_attention(n)] for nodes in (added, removed))
    for pair in pairs:
        if pair.a.op != pair.b.op:
            found[f"{pair.a.short_op} -> {pair.b.short_op}"] = {pair.b.by}
        for change in sorted(pair.causes):
            found.setdefault(words_for_change(change, cell.cell.role, heads), set()).update(pair.causes[change])
    for text in words_for_ops(added, removed, alone=not found):
        found[text] = {n.by for n in (*added, *removed)}
    if not found:
        calls = [(words_for_call(p.a, p.b), p.b.by) for p in pairs]
        found = {text: {by} for text, by in calls if text}
    if not found:
        found = {_words_for_reads(cell): makers}
    return [phrase for text, by in found.items() for phrase in _with([text], by, cell, suspects)]


def _with(texts: Sequence[str], by: set[str], cell: CellDiff, suspects: Suspects) -> Phrases:
    return [(text, suspects.named(by, cell.ends)) for text in texts]


def _words_for_reads(cell: CellDiff) -> str:
    """For nodes that only read other values than before."""
    before, after = next((p.reads for p in cell.pairs if p.reads), ("", ""))
    if cell.cell.role == RESULT:
        return "returns other values"
    return "reads other values" if before == after else f"reads {after} instead of {before}"
