"""The top of the diff page: both models, key figures, every number of the cost, gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from foveate.report.page.charts import pair
from foveate.report.page.figures import change_text, label, number, shown
from foveate.report.page.markup import Html, join, tag

MAIN = frozenset({"flops", "bytes", "time_s", "nodes"})
"""Figures of a graph that are shown at once; the others are folded."""

KEY_FIGURES = ("prefill.flops", "prefill.time_s", "kv_bytes", "peak_bytes")

Diff = Mapping[str, Any]


def header(diff: Diff) -> Html:
    """Both models with their passes, what the diff found in a sentence, and its notes."""
    sides = [
        tag(
            "div",
            tag("p", word, class_="eyebrow"),
            tag("p", diff[key]["name"] or "unnamed", class_="model"),
            _pipeline(diff[key].get("passes", ())),
            _about(diff[key]),
        )
        for key, word in (("a", "A, before"), ("b", "B, after"))
    ]
    notes = tag("ul", (tag("li", note) for note in diff["notes"]), class_="notes") if diff["notes"] else None
    return tag(
        "header",
        tag("h1", "Graph diff"),
        tag("p", verdict(diff), class_="lead"),
        tag("div", sides, class_="sides"),
        notes,
    )


def verdict(diff: Diff) -> str:
    """One sentence: how many graphs differ, and how the gates stand."""
    graphs = diff["graphs"].values()
    differ = sum(bool(graph["changed"]) for graph in graphs)
    words = f"{differ} of {len(graphs)} graphs differ" if differ else "The graphs are the same"
    failed = sum(not gate["ok"] for gate in diff["gates"])
    if diff["gates"]:
        words += f"; {failed} of {len(diff['gates'])} gates failed" if failed else "; all gates passed"
    return f"{words}."


def _pipeline(passes: Sequence[str]) -> Html:
    if not passes:
        return tag("p", "no passes", class_="quiet")
    return tag("ul", (tag("li", tag("code", text)) for text in passes), class_="passes-of")


def _about(side: Mapping[str, Any]) -> Html:
    known = [side[key] for key in ("versions", "sizes") if isinstance(side.get(key), Mapping)]
    lines = [", ".join(f"{name.replace('_', ' ')} {value}" for name, value in about.items()) for about in known]
    return join(tag("p", line, class_="quiet") for line in lines)


def summary(diff: Diff) -> Html:
    """Key figures as cards, then every number of the cost, by graph."""
    cost = diff["cost"]
    cards = [
        tag(
            "div",
            tag("p", _long_label(name), class_="eyebrow"),
            tag("p", _shown(name, cost[name], "b"), class_="big"),
            tag("p", _change(cost[name]), f" from {_shown(name, cost[name], 'a')}", class_="quiet"),
            class_="card",
        )
        for name in KEY_FIGURES
        if name in cost
    ]
    figures = dict(cost)
    for graph, entry in diff["graphs"].items():
        figures[f"{graph}.nodes"] = _counted(entry["nodes"])
    main = {name: entry for name, entry in figures.items() if _is_main(name)}
    more = {name: entry for name, entry in figures.items() if not _is_main(name)}
    folded = tag("details", tag("summary", "More figures"), _costs(more, [*diff["graphs"]])) if more else None
    return join([tag("div", cards, class_="cards"), _costs(main, [*diff["graphs"]]), folded])


def _is_main(name: str) -> bool:
    return "." not in name or name.rpartition(".")[2] in MAIN


def _costs(figures: Mapping[str, Mapping[str, Any]], graphs: Sequence[str]) -> Html:
    order = {name: place for place, name in enumerate([*graphs, ""])}
    names = sorted(figures, key=lambda name: order.get(_graph_of(name), -1))
    bodies = [
        tag(
            "tbody",
            tag("tr", tag("th", graph or "whole model", scope="rowgroup", colspan=5)),
            [_cost_row(name, figures[name]) for name in group],
        )
        for graph, group in groupby(names, key=_graph_of)
    ]
    head = tag(
        "tr",
        tag("th", "quantity", scope="col"),
        tag("th", "before", scope="col", class_="num"),
        tag("th", "after", scope="col", class_="num"),
        tag("th", "change", scope="col", class_="num"),
        tag("th", tag("span", "bars", class_="unseen"), scope="col"),
    )
    return tag("table", tag("thead", head), bodies, class_="costs")


def _counted(nodes: Mapping[str, Any]) -> dict[str, Any]:
    a, b = number(nodes["a"]) or 0.0, number(nodes["b"]) or 0.0
    return {"a": a, "b": b, "change": (b - a) / a if a else None}


def _graph_of(name: str) -> str:
    return name.rpartition(".")[0].partition(".")[0]


def _cost_row(name: str, entry: Mapping[str, Any]) -> Html:
    return tag(
        "tr",
        tag("th", label(name), scope="row"),
        tag("td", _shown(name, entry, "a"), class_="num"),
        tag("td", _shown(name, entry, "b"), class_="num"),
        tag("td", _change(entry), class_="num"),
        tag("td", pair(number(entry["a"]), number(entry["b"])), class_="bars"),
    )


def _shown(name: str, entry: Mapping[str, Any], side: str) -> str:
    return shown(name, number(entry[side]))


def _change(entry: Mapping[str, Any]) -> Html:
    a, b = number(entry["a"]), number(entry["b"])
    way = "" if a is None or b is None or a == b else " less" if b < a else " more"
    return tag("span", change_text(number(entry["change"]), a, b), class_=f"change{way}")


def _long_label(name: str) -> str:
    return f"{_graph_of(name)} {label(name)}".strip()


def gates(diff: Diff) -> Html:
    """Each gate with its value and whether it passed."""
    if not diff["gates"]:
        return tag("p", "No gates were asked for.", class_="quiet")
    rows = [
        tag(
            "tr",
            tag(
                "td",
                tag(
                    "span",
                    "\N{CHECK MARK} passed" if gate["ok"] else "\N{BALLOT X} failed",
                    class_=f"mark {'ok' if gate['ok'] else 'failed'}",
                ),
            ),
            tag("td", tag("code", gate["gate"])),
            tag("td", _gate_value(gate), class_="num"),
        )
        for gate in diff["gates"]
    ]
    head = tag(
        "tr",
        tag("th", "result", scope="col"),
        tag("th", "fails if", scope="col"),
        tag("th", "value", scope="col", class_="num"),
    )
    return tag("table", tag("thead", head), tag("tbody", rows), class_="gates")


def _gate_value(gate: Mapping[str, Any]) -> str:
    """The value in the unit of the bound: a share for per cent, else what the quantity is counted in.

    None stands for an infinite change, from nothing to something.
    """
    value = number(gate["value"])
    if value is None or not math.isfinite(value):
        return "\N{INFINITY}"
    sign = "\N{MINUS SIGN}" if value < 0 else "+"
    if gate["kind"] == "relative":
        return f"{sign}{100 * abs(value):.2f}%"
    signed = value < 0 or gate["kind"] == "change"
    return f"{sign if signed else ''}{shown(gate['quantity'], abs(value))}"
