"""A diff of two programs for readers: in a terminal, in a pull request, as JSON, as a page.

Names in snapshots may come from anywhere: in text they lose control characters, in Markdown they stand in code spans.
"""

from __future__ import annotations

import functools
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from foveate.ir.diff import Diff, diff
from foveate.ir.diff.gates import GateResult, check_gates
from foveate.ir.snapshot import Snapshot, read_snapshot
from foveate.ir.snapshot.file import printable
from foveate.report.figures import count, ms, size

if TYPE_CHECKING:
    from foveate.ir.program import Program
    from foveate.model import OptimizedModel

Source: TypeAlias = "Program | OptimizedModel | Snapshot | str | Path"

SUMMARY: dict[str, tuple[str, Callable[[float], str]]] = {
    "vision.flops": ("vision FLOPs", count),
    "prefill.flops": ("prefill FLOPs", count),
    "decode.flops": ("decode FLOPs", count),
    "vision.time_s": ("vision ms", ms),
    "prefill.time_s": ("prefill ms", ms),
    "decode.time_s": ("decode ms", ms),
    "kv_bytes": ("KV cache", size),
    "peak_bytes": ("peak memory", size),
}
"""Figures of the cost that the summary shows; the JSON has all."""

COMMENT = 60_000
"""Characters that Markdown stays below; a comment on GitHub may have 65,536."""

LONGEST = 240
"""Characters of one text from a snapshot that Markdown shows."""

MOST = 60
"""Notes, passes and gates of a summary; so many are no summary any more."""


def diff_report(a: Source, b: Source, gates: Iterable[str] = (), **sizes: Any) -> DiffReport:
    """What differs in `b`, with gates such as `prefill.flops>+1%` checked.

    a, b: programs, optimized models, snapshots, or paths of snapshot files. sizes: what `foveate.cost` takes, for
    those that are no snapshots yet. Raises ArtifactError for a damaged file, InputError for a gate or size that is
    wrong.
    """
    found = diff(_snapshot(a, sizes), _snapshot(b, sizes))
    plain = found.to_json()
    return DiffReport(found, tuple(check_gates(gates, plain)))


def _snapshot(source: Source, sizes: dict[str, Any]) -> Snapshot:
    if isinstance(source, Snapshot):
        return source
    if isinstance(source, (str, Path)):
        return read_snapshot(source)
    # Two files are compared without waiting for torch.
    from foveate.ir.program import Program
    from foveate.ir.snapshot.make import snapshot

    program = source if isinstance(source, Program) else source.program
    return snapshot(program, name=program.info.family, **sizes)


@dataclass(frozen=True)
class DiffReport:
    """A diff and its gates; printing it gives the text for a terminal."""

    diff: Diff
    gates: tuple[GateResult, ...] = ()

    @property
    def changed(self) -> bool:
        """Whether some graph computes something else."""
        return self.diff.changed

    @property
    def failed(self) -> list[GateResult]:
        """Gates that do not hold."""
        return [gate for gate in self.gates if not gate.ok]

    @functools.cached_property
    def _data(self) -> dict[str, Any]:
        return {**self.diff.to_json(), "gates": [gate.to_json() for gate in self.gates]}

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return self._data

    def to_html(self) -> str:
        """A page that needs no other file."""
        from foveate.report.page import diff_page

        return diff_page(self._data)

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int = 80) -> str:
        """For a terminal, no line longer than `width`."""
        return "\n".join(line for part in self._text() for line in _wrapped(printable(part), width))

    def _text(self) -> Iterator[str]:
        for side in ("a", "b"):
            about = self._data[side]
            yield f"{side.upper()}: {about['name'] or 'unnamed'}, {', '.join(about['passes']) or 'no passes'}"
        yield from (f"note: {note}" for note in self._data["notes"])
        rows = [("", "A", "B", "change"), *self._rows()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        yield from (f"{n:{widths[0]}}  {a:>{widths[1]}}  {b:>{widths[2]}}  {c:>{widths[3]}}" for n, a, b, c in rows)
        yield from (f"{_mark(g)}  {g.gate.text}  ({g.measured})" for g in self.gates)
        if not self.changed:
            yield "the graphs are the same"
        for name, graph in self._changed_graphs():
            yield f"{name}: {graph['nodes']['a']} -> {graph['nodes']['b']} nodes"
            for where, what, by in self._lines(graph):
                yield f"  {where}: {what}" + (f"  ({by})" if by else "")

    def to_markdown(self) -> str:
        """For a pull request, below `COMMENT` characters: details are left out before the summary is."""
        summary = "\n".join(self._summary())
        left = COMMENT - len(summary) - 1
        details = []
        graphs = list(self._changed_graphs())
        for place, (name, graph) in enumerate(graphs):
            # Every graph may use an equal share of what is left.
            part = self._details(name, graph, left // (len(graphs) - place))
            details.append(part)
            left -= len(part)
        return summary + "\n" + "".join(details)

    def _summary(self) -> Iterator[str]:
        data = self._data
        names = [_code(data[side]["name"] or "unnamed") for side in ("a", "b")]
        yield f"### Graph diff: {names[0]} → {names[1]}"
        yield ""
        for label, side in (("Before", "a"), ("After", "b")):
            passes = _some([_code(text) for text in data[side]["passes"]], "passes")
            yield f"{label}: {', '.join(passes) or 'no passes'}  "
        if not self.changed:
            yield "**The graphs are the same.**  "
        yield from _some([f"Note: {_code(note)}  " for note in data["notes"]], "notes")
        yield "\n| | before | after | change |\n|---|--:|--:|--:|"
        yield from (f"| {' | '.join(row)} |" for row in self._rows())
        if self.gates:
            yield "\n| gate | | measured |\n|---|---|--:|"
            shown = sorted(self.gates, key=lambda g: g.ok)
            rows = [f"| {_cell(g.gate.text)} | {_mark(g, '✅ ', '❌ ')} | {g.measured} |" for g in shown]
            yield from rows[:MOST]
            if len(rows) > MOST:
                yield f"| and {len(rows) - MOST} more gates | {sum(not g.ok for g in shown[MOST:])} of them fail | |"
        yield ""

    def _details(self, name: str, graph: dict[str, Any], room: int) -> str:
        nodes = graph["nodes"]
        title = f"{re.sub('[^A-Za-z0-9_ ]', '?', name)}: {nodes['a']} → {nodes['b']} nodes"
        start = f"<details>\n<summary>{title}</summary>\n\n"
        end = "\n</details>\n"
        lines = []
        for where, what, by in self._lines(graph):
            lines.append(f"- {_code(where)}: {_code(what)}" + (f" ({_code(by)})" if by else "") + "\n")
        # Room for the line that says what is missing is kept, needed or not.
        room -= len(start) + len(end) + 100
        kept = 0
        while kept < len(lines) and len(lines[kept]) <= room:
            room -= len(lines[kept])
            kept += 1
        if kept < len(lines):
            lines[kept:] = [f"- {len(lines) - kept} more changes are left out here; `foveate diff` shows them all\n"]
        return start + "".join(lines) + end

    def _rows(self) -> list[tuple[str, str, str, str]]:
        rows = []
        for name, (label, shown) in SUMMARY.items():
            entry = self._data["cost"].get(name)
            if entry is not None:
                a, b = (("-" if entry[side] is None else shown(entry[side])) for side in ("a", "b"))
                rows.append((label, a, b, _change(entry)))
        return rows

    def _changed_graphs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        return ((name, graph) for name, graph in self._data["graphs"].items() if graph["changed"])

    def _lines(self, graph: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
        """Where, what and by which passes, for each change."""
        short = {role: name for s in (self.diff.a, self.diff.b) for name, role in s.data["model"]["roles"].items()}
        for change in graph["changes"]:
            stream = "" if change["stream"] == "none" else change["stream"]
            roles = "all" if change["whole"] else _roles(change["roles"], short)
            where = f"{_layers(change['layers'])}, {stream} {roles}".rstrip(" ,").replace(",  ", ", ")
            yield where, change["what"], ", ".join(change["by"])


def _layers(span: Sequence[int]) -> str:
    first, last = span
    if last < 0:
        return "before layer 0"
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def _roles(roles: Sequence[str], short: dict[str, str]) -> str:
    """Linears by their short names, as q/k/v/o, if there are any: the roles between them follow; else the first few."""
    known = [name for role, name in short.items() if role in roles]
    if known:
        return "/".join(known)
    shown = [role for role in roles if role not in ("", "output")]
    return ", ".join(shown[:3]) + (f" and {len(shown) - 3} more" if len(shown) > 3 else "")


def _change(entry: dict[str, Any]) -> str:
    if entry["change"] is None:
        return "new" if entry["a"] is None else "gone" if entry["b"] is None else "from 0"
    share = 100 * entry["change"]
    return "same" if not share else f"{share:+.1f}%" if abs(share) >= 0.05 else f"{share:+.1g}%"


def _mark(gate: GateResult, good: str = "", bad: str = "") -> str:
    return f"{good}pass" if gate.ok else f"{bad}FAIL"


def _wrapped(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line.rstrip()]
    indent = " " * min(len(line) - len(line.lstrip()) + 4, width // 2)
    return textwrap.wrap(line, width, subsequent_indent=indent, break_on_hyphens=False)


def _some(lines: list[str], kind: str) -> list[str]:
    return lines if len(lines) <= MOST else [*lines[:MOST], f"and {len(lines) - MOST} more {kind}"]


def _code(text: str) -> str:
    """Text that Markdown leaves alone: a code span that no backtick inside can end."""
    text = " ".join(printable(text).split())
    if len(text) > LONGEST:
        text = text[: LONGEST - 3] + "..."
    fence = "`"
    while fence in text:
        fence += "`"
    pad = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{pad}{text or ' '}{pad}{fence}"


def _cell(text: str) -> str:
    """The same in a table, where a bar would end the cell."""
    return _code(text).replace("|", "\\|")
