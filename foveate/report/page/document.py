"""A graph diff as one HTML page that needs nothing else: no network, no other file, no library.

What the page says in words and figures is written here, so that it stands where scripts may not run. The script only
draws the graph. Both are let in by their hashes, and all data comes in as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from importlib import resources
from string import Template
from typing import Any

from foveate.report.page import sections, summary
from foveate.report.page.figures import layers_text
from foveate.report.page.markup import Html, cleaned, join, tag

SCRIPTS = ("dom.js", "lines.js", "details.js", "graph.js", "page.js")
"""In this order they make one script."""

Diff = Mapping[str, Any]


def diff_page(diff: Mapping[str, Any]) -> str:
    """A whole HTML document from the JSON form of a diff.

    Any string of the diff stays text, whatever it holds; characters that cannot be seen are shown by number.
    """
    diff = cleaned(diff)
    style = f"\n{_asset('page.css')}"
    script = "\n".join(['\n"use strict";', "(() => {", *map(_asset, SCRIPTS), "})();", ""])
    names = [diff[key]["name"] or "unnamed" for key in ("a", "b")]
    return Template(_asset("page.html")).substitute(
        policy=policy(style, script),
        title=join([f"Graph diff: {names[0]} \N{RIGHTWARDS ARROW} {names[1]}"]),
        style=style,
        header=summary.header(diff),
        body=_body(diff),
        data=data_block(_drawn(diff)),
        script=script,
    )


def policy(style: str, script: str) -> str:
    """A Content-Security-Policy that lets in this style and this script, and nothing from anywhere else."""
    return (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def data_block(value: Any) -> str:
    """JSON that may stand inside a script element: ASCII, and without any `<`, `>` or `&`."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _asset(name: str) -> str:
    return (resources.files("foveate.report.page") / "assets" / name).read_text(encoding="utf-8")


def _body(diff: Diff) -> Html:
    parts = (
        ("summary", "Summary", summary.summary(diff)),
        ("gates", "Gates", summary.gates(diff)),
        ("changes", "Changes", sections.changes(diff)),
        ("graph", "Graph", tag("p", "The graph is drawn by a script, which has not run here.", id="undrawn")),
        ("layers", "Cost by layer", sections.costs_by_layer(diff)),
        ("cache", "KV cache", sections.cache(diff)),
        ("passes", "Passes", sections.passes(diff)),
    )
    links = tag(
        "nav",
        tag("ul", [tag("li", tag("a", title, href=f"#{name}")) for name, title, _ in parts]),
        aria_label="Sections",
    )
    return join(
        [
            links,
            tag(
                "main",
                [
                    tag(
                        "section",
                        tag("h2", title, id=f"{name}-title"),
                        content,
                        id=name,
                        aria_labelledby=f"{name}-title",
                    )
                    for name, title, content in parts
                ],
            ),
        ]
    )


def _drawn(diff: Diff) -> list[dict[str, Any]]:
    """What the script draws: the graphs with their sections, layers in words."""
    return [
        {
            "name": name,
            "sections": [
                {
                    "label": layers_text(section["layers"], sections.output_layer(diff, name)),
                    "layers": section["layers"],
                    "cells": section["cells"],
                }
                for section in graph["sections"]
            ],
        }
        for name, graph in diff["graphs"].items()
    ]
