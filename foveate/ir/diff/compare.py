"""What differs between two programs: their graphs cell by cell, their cost, what they cache, and their passes.

Names do not matter: nodes correspond by stream, role and order, and two are the same if they compute the same from
values that correspond. So a diff is empty exactly if both snapshots hold the same graphs up to names.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from foveate.ir.diff.cells import Suspects, folded_changes, sections
from foveate.ir.diff.graphs import LayerDiff, compare
from foveate.ir.diff.layers import Graph
from foveate.ir.diff.words import Heads
from foveate.ir.snapshot import Snapshot

if TYPE_CHECKING:
    from foveate.ir.program import Program

EMPTY: dict[str, Any] = {"inputs": [], "sections": [], "returns": {}}
"""A graph that one of the programs does not have."""


@dataclass(frozen=True)
class GraphDiff:
    """One graph of both programs; nodes: how many each has, all layers counted."""

    layers: Mapping[int, LayerDiff]
    heads: Heads
    suspects: Suspects
    nodes: tuple[int, int]

    @functools.cached_property
    def changed(self) -> bool:
        """Whether any cell differs."""
        return any(cell.state != "same" for layer in self.layers.values() for cell in layer.cells)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "changed": self.changed,
            "nodes": {"a": self.nodes[0], "b": self.nodes[1]},
            "sections": sections(self.layers, self.heads, self.suspects),
            "changes": [c.to_json() for c in folded_changes(self.layers, self.heads, self.suspects)],
        }


@dataclass(frozen=True)
class Diff:
    """Two snapshots and what differs between their graphs."""

    a: Snapshot
    b: Snapshot
    graphs: Mapping[str, GraphDiff]

    @property
    def changed(self) -> bool:
        """Whether some graph computes something else; cost, names and versions alone do not count."""
        return any(graph.changed for graph in self.graphs.values())

    def to_json(self) -> dict[str, Any]:
        """As plain data; `gates` is for the caller to fill."""
        a, b = self.a.data, self.b.data
        return {
            "changed": self.changed,
            "a": _about(self.a),
            "b": _about(self.b),
            "notes": self.notes(),
            "graphs": {name: graph.to_json() for name, graph in self.graphs.items()},
            "cost": costs(a["cost"], b["cost"]),
            "parts": {
                name: {"a": a["parts"].get(name, []), "b": b["parts"].get(name, [])}
                for name in dict.fromkeys([*a["parts"], *b["parts"]])
            },
            "kv": {"a": a["kv"], "b": b["kv"]},
            "passes": {"a": a["passes"], "b": b["passes"]},
            "gates": [],
        }

    def notes(self) -> list[str]:
        """What a reader must know to trust the comparison."""
        a, b = self.a.data, self.b.data
        notes = []
        versions = _differing(a["versions"], b["versions"], "")
        if versions:
            notes.append(f"made with {versions}: graphs may differ for that reason alone")
        sizes = _differing(a["sizes"], b["sizes"])
        if sizes:
            notes.append(f"costs are for different sizes: {sizes}")
        models = _differing(_kind(self.a), _kind(self.b))
        if models:
            notes.append(f"different models: {models}")
        if not self.changed and self.a.passes != self.b.passes:
            notes.append("the graphs are the same but the passes are not: passes also rearrange weights")
        return notes


def diff(a: Snapshot | Program, b: Snapshot | Program) -> Diff:
    """What is different in `b`. Programs are compared by their snapshots at default sizes."""
    one, other = (x if isinstance(x, Snapshot) else _taken(x) for x in (a, b))
    heads = Heads.of(other.data["model"])
    left, right = one.data["graphs"], other.data["graphs"]
    graphs = {name: _pair(name, one, other) for name in dict.fromkeys([*left, *right])}
    suspects = _suspects(one, other, {n.by for _, g in graphs.values() for x in g.layers.values() for n in x.nodes})
    found = {
        name: GraphDiff(compare(x, y, suspects.passes), heads, suspects, (x.count, y.count))
        for name, (x, y) in graphs.items()
    }
    if "decode" in found and "prefill" in found:
        # The decode graph is derived from the prefill graph, so that no pass leaves its name there.
        found["decode"] = replace(found["decode"], suspects=replace(suspects, known=_known(found["prefill"])))
    return Diff(one, other, found)


def _taken(program: Program) -> Snapshot:
    # Two files are compared without waiting for torch.
    from foveate.ir.snapshot.make import snapshot

    return snapshot(program)


def _about(snap: Snapshot) -> dict[str, Any]:
    return {"name": snap.name, "passes": snap.passes, "versions": snap.data["versions"], "sizes": snap.data["sizes"]}


def _pair(name: str, a: Snapshot, b: Snapshot) -> tuple[Graph, Graph]:
    """A graph of both, or an empty one; what follows the decoder's last layer has the same number in both."""
    data = [x.data["graphs"].get(name, EMPTY) for x in (a, b)]
    if name not in ("prefill", "decode"):
        return Graph.of(data[0]), Graph.of(data[1])
    ends = [x.data["model"]["layers"] for x in (a, b)]
    return Graph.of(data[0], ends[0], max(ends)), Graph.of(data[1], ends[1], max(ends))


def _known(graph: GraphDiff) -> dict[tuple[int, str, str], list[str]]:
    changes = folded_changes(graph.layers, graph.heads, graph.suspects)
    return {(n, c.stream, c.what): c.by for c in changes for n in range(c.layers[0], c.layers[1] + 1)}


def _suspects(a: Snapshot, b: Snapshot, makers: set[str]) -> Suspects:
    """Whom to hold responsible: see `Suspects`. Between different models or versions, nobody without a trace."""
    new = [text for text in b.passes if text not in a.passes]
    different = new + [text for text in a.passes if text not in b.passes]
    traceless = [text for text in new if _name(text) not in makers]
    passes = tuple(dict.fromkeys(map(_name, [*b.passes, *a.passes])))
    if _kind(a) != _kind(b) or a.data["versions"] != b.data["versions"]:
        return Suspects(passes)
    return Suspects(
        passes,
        only=_name(different[0]) if len(different) == 1 else "",
        traceless=_name(traceless[0]) if len(traceless) == 1 else "",
    )


def _name(passed: str) -> str:
    return passed.partition("{")[0]


def _kind(snap: Snapshot) -> dict[str, Any]:
    """What makes a model another one."""
    return {key: value for key, value in snap.data["model"].items() if key not in ("name", "parameters", "roles")}


def _differing(a: Mapping[str, Any], b: Mapping[str, Any], verb: str = "is ") -> str:
    """`batch is 1 and 2, device is cpu and h100`."""
    pairs = [(key, a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b])]
    return ", ".join(f"{key} {verb}{_shown(x)} and {_shown(y)}" for key, x, y in pairs if x != y)


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


def costs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """Every number of two costs by its dotted name; `change` is relative, None where infinite or a side is missing."""
    one, other = dotted(a), dotted(b)
    return {
        name: {"a": one.get(name), "b": other.get(name), "change": change(one.get(name), other.get(name))}
        for name in dict.fromkeys([*one, *other])
    }


def dotted(cost: Mapping[str, Any]) -> dict[str, float]:
    """Numbers by dotted name: `prefill.flops`."""
    found: dict[str, float] = {}
    for name, value in cost.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": v for key, v in dotted(value).items()}
        elif isinstance(value, (int, float)):
            found[name] = value
    return found


def change(a: float | None, b: float | None) -> float | None:
    """(b - a) / a to 6 digits; 0 if both are 0, None if only a is."""
    if a is None or b is None or (a == 0 and b != 0):
        return None
    return float(f"{(b - a) / a:.6g}") if a else 0.0
