"""The lower sections of the diff page that need no script: changes, cost by layer, cache, passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from foveate.report.figures import LABELS, UNITS, size
from foveate.report.page.charts import by_layer
from foveate.report.page.figures import arrows, change_text, layers_text, number
from foveate.report.page.markup import Html, join, tag

SIGNS = {"same": "=", "changed": "~", "removed": "\N{MINUS SIGN}", "added": "+"}
MOST_OPEN = 60
"""A longer list of changes is folded."""
MOST_ROLES = 5
"""So are more roles of one change."""

COLUMNS = ("state", "layers", "stream", "roles", "what", "by")

Diff = Mapping[str, Any]


def changes(diff: Diff) -> Html:
    """What changed in each graph, folded over layers and roles."""
    return join(_changes_of(name, graph, output_layer(diff, name)) for name, graph in diff["graphs"].items())


def output_layer(diff: Diff, graph: str) -> int | None:
    """The layer number of what comes after a graph's layers: the decoder's are those that keep keys and values."""
    ends = [entry["layers"][1] + 1 for side in diff["kv"].values() for entry in side]
    return max(ends, default=None) if not graph.startswith("vision") else None


def _changes_of(name: str, graph: Mapping[str, Any], last: int | None) -> Html:
    rows = [
        tag(
            "tr",
            tag(
                "td",
                tag(
                    "span",
                    tag("span", SIGNS[c["state"]], aria_hidden="true"),
                    f" {c['state']}",
                    class_=f"state {c['state']}",
                ),
            ),
            tag("td", layers_text(c["layers"], last)),
            tag("td", c["stream"]),
            tag("td", _roles(c["roles"])),
            tag("td", arrows(c["what"])),
            tag("td", ", ".join(c["by"]), class_="quiet"),
            data_graph=name,
            data_layer=c["layers"][0],
            data_stream=c["stream"],
            data_role=next(iter(c["roles"]), ""),
        )
        for c in graph["changes"]
    ]
    if not rows:
        return join([tag("h3", name), tag("p", "No change.", class_="quiet")])
    head = tag("tr", [tag("th", word, scope="col", class_=f"at-{word}") for word in COLUMNS])
    table = tag("table", tag("thead", head), tag("tbody", rows), class_="changes")
    many = f"{len(rows)} changes" if len(rows) > 1 else "1 change"
    return join([tag("h3", name), tag("details", tag("summary", many), table, open=len(rows) <= MOST_OPEN)])


def _roles(roles: Sequence[str]) -> Html:
    listed = join(join([tag("code", role or "(no role)"), " "]) for role in roles)
    return listed if len(roles) <= MOST_ROLES else tag("details", tag("summary", f"{len(roles)} roles"), listed)


def costs_by_layer(diff: Diff) -> Html:
    """A chart of each graph."""
    charts = [
        by_layer(graph, parts["a"], parts["b"], output_layer(diff, graph)) for graph, parts in diff["parts"].items()
    ]
    found = [chart for chart in charts if chart is not None]
    if not found:
        return tag("p", "The diff holds no cost by layer.", class_="quiet")
    return tag("div", found, class_="charts")


def cache(diff: Diff) -> Html:
    """Keys and values that each layer keeps, equal neighbours in one row."""
    rows = [
        tag(
            "tr",
            tag("th", layers_text(layers), scope="row"),
            _kept(before, after, "visual"),
            _kept(before, after, "text"),
        )
        for layers, before, after in _side_by_side(diff["kv"]["a"], diff["kv"]["b"])
    ]
    if not rows:
        return tag("p", "The diff holds no cache.", class_="quiet")
    head = tag("tr", (tag("th", word, scope="col") for word in ("layers", "visual", "text")))
    return tag("table", tag("thead", head), tag("tbody", rows), class_="kv")


def _kept(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, stream: str) -> Html:
    a, b = ((entry or {}).get(stream) for entry in (before, after))
    if a == b:
        return tag("td", tag("span", _kept_text(a), class_="quiet"))
    return tag("td", tag("del", _kept_text(a)), tag("span", " becomes ", class_="unseen"), tag("ins", _kept_text(b)))


def _kept_text(kept: str | None) -> Html | str:
    return tag("code", kept) if kept else "nothing"


def _side_by_side(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[tuple[int, int], Mapping[str, Any] | None, Mapping[str, Any] | None]]:
    """Layer ranges cut where either side changes, with the entry of each side."""
    starts = {entry["layers"][0] for entry in (*a, *b)}
    ends = {entry["layers"][1] + 1 for entry in (*a, *b)}
    cuts = sorted(starts | ends)
    for first, stop in pairwise(cuts):
        sides = [next((e for e in side if e["layers"][0] <= first <= e["layers"][1]), None) for side in (a, b)]
        if any(side is not None for side in sides):
            yield (first, stop - 1), sides[0], sides[1]


def passes(diff: Diff) -> Html:
    """The pass reports of A and B side by side."""
    columns = [
        tag("div", tag("h3", word), _records(diff["passes"][key]))
        for key, word in (("a", "A, before"), ("b", "B, after"))
    ]
    return tag("div", columns, class_="sides")


def _records(records: Sequence[Mapping[str, Any]]) -> Html:
    if not records:
        return tag("p", "No passes: the model does all its work.", class_="quiet")
    return tag("ol", (tag("li", tag("p", tag("code", r["text"])), _record(r)) for r in records), class_="records")


def _record(record: Mapping[str, Any]) -> Html:
    if record.get("skipped") is not None:
        return tag("p", tag("span", "skipped", class_="mark"), f" {record['skipped']}")
    lines = [tag("p", arrows(note)) for note in record["notes"]]
    edits = ", ".join(f"{many} {kind}" for kind, many in record["edits"].items())
    effects = [_effect(name, *record["cost"][name]) for name in LABELS if name in (record.get("cost") or {})]
    lines += [
        tag("p", line, class_="quiet") for line in ("; ".join(effects), f"edits: {edits}" if edits else "") if line
    ]
    return join(lines)


def _effect(name: str, before: Any, after: Any) -> str:
    a, b = number(before), number(after)
    show = UNITS.get(name, size)
    if a is None or b is None or a == b:
        return f"{LABELS[name]}: no change"
    change = change_text((b - a) / a if a else None, a, b)
    return f"{LABELS[name]} {show(a)} \N{RIGHTWARDS ARROW} {show(b)} ({change})"
