"""A diff for readers: widths, escaping, and a comment that always fits."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from foveate.errors import ArtifactError, InputError
from foveate.ir.snapshot import Snapshot
from foveate.ir.snapshot.make import snapshot
from foveate.report.diff import COMMENT, DiffReport, diff_report
from tests.ir.programs import once, optimized, pruned, traced

SIZES: dict[str, Any] = {"text_tokens": 7, "device": "cpu"}
PIPELINE = "drop-visual-neurons{keep=0.5},cut-visual{from_layer=2}"
HOSTILE = "`x` | y ``` <script>alert(1)</script> @owner #1 [a](b) ![i](http://x) $e$ **b** \\ &amp; </details>"


@once
def taken(pipeline: str = "") -> Snapshot:
    return snapshot(pruned(pipeline) if pipeline else traced()[1], name="tiny", **SIZES)


def made(*gates: str) -> DiffReport:
    return diff_report(taken(), taken(PIPELINE), gates)


def test_text_tells_models_cost_gates_and_changes() -> None:
    text = made("prefill.flops>+1%", "kv_bytes<-1%").to_text()
    lines = text.splitlines()
    assert lines[0] == "A: tiny, no passes"
    assert lines[1] == "B: tiny, drop-visual-neurons, cut-visual{from_layer=2}"
    assert re.search(r"^prefill FLOPs +[\d.]+[kMG] +[\d.]+[kMG] +-[\d.]+%$", text, re.M)
    assert re.search(r"^vision FLOPs .* same$", text, re.M)
    assert "pass  prefill.flops>+1%" in text and "FAIL  kv_bytes<-1%" in text
    assert "  layers 0-0, visual" not in text and "  layer 0, visual gate/up/down: 48 -> 24" in text
    assert "visual keys and values no longer cached" in text
    assert str(made()) == made().to_text()


@pytest.mark.parametrize("width", [30, 80, 200])
def test_lines_fit_the_width(width: int) -> None:
    assert max(map(len, made("prefill.flops>+1%").to_text(width).splitlines())) <= width


def test_no_change() -> None:
    report = diff_report(taken(PIPELINE), taken(PIPELINE))
    assert not report.changed
    assert "the graphs are the same" in report.to_text()
    markdown = report.to_markdown()
    assert "**The graphs are the same.**" in markdown and "<details>" not in markdown


def test_markdown_has_a_title_a_table_gates_and_details() -> None:
    markdown = made("prefill.flops>+1%", "kv_bytes<-1%").to_markdown()
    assert markdown.startswith("### Graph diff: `tiny` → `tiny`\n")
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table[:10]} == {5}
    assert "| `kv_bytes<-1%` | ❌ FAIL |" in markdown
    assert "| `prefill.flops>+1%` | ✅ pass |" in markdown
    # What fails stands first.
    assert markdown.index("❌") < markdown.index("✅")
    assert markdown.count("<details>") == markdown.count("</details>") == 2
    assert "- `layer 0, visual gate/up/down`: `48 -> 24` (`drop-visual-neurons`)" in markdown


def hostile() -> Snapshot:
    """As no file could hold it: names with markup, control characters and line ends everywhere."""
    snap = copy.deepcopy(taken(PIPELINE))
    nasty = HOSTILE + "\n# title\n\x1b[2J\u202e"
    snap.data["model"]["name"] = nasty
    snap.data["passes"][0]["text"] = nasty
    snap.data["versions"]["torch"] = nasty
    graph = snap.data["graphs"]["prefill"]
    graph["sections"][1]["nodes"].append(["x", "aten.neg.default(text)", "visual", nasty, nasty, nasty])
    graph["sections"][1]["nodes"][0][5] = f"float32[{nasty}]"
    snap.data["graphs"][nasty] = snap.data["graphs"]["vision"]
    return snap


def outside_code(markdown: str) -> str:
    """Markdown without its code spans, as CommonMark pairs backticks."""
    return re.sub(r"(?<!`)(`+)(?!`)(.*?[^`])\1(?!`)", "", markdown)


def test_hostile_names_are_no_markup() -> None:
    report = diff_report(taken(), hostile())
    markdown = report.to_markdown()
    left = outside_code(markdown)
    for piece in ("<script", "@owner", "](b)", "http:", "**b**", "$e$", "\x1b", "\u202e", "\n# title"):
        assert piece not in left, piece
    assert re.findall(r"</?[a-z]+", left) == ["<details", "<summary", "</summary", "</details"] * left.count(
        "<details>"
    )
    for row in markdown.splitlines():
        if row.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", row)) in (4, 5)
    text = report.to_text()
    assert "\x1b" not in text and "\u202e" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_gate_is_escaped_too() -> None:
    markdown = made("prefill.flops>+1%").to_markdown()
    assert ">+1%" not in outside_code(markdown)


def test_a_comment_always_fits_and_the_summary_is_never_cut() -> None:
    snap = copy.deepcopy(taken(PIPELINE))
    nodes = snap.data["graphs"]["prefill"]["sections"][1]["nodes"]
    long = "x" * 90
    nodes += [[f"n_{k}", f"foveate.op{k}.default(text)", "text", f"{long}{k}", "p", "int64[1]"] for k in range(3000)]
    snap.data["passes"] *= 2000
    report = diff_report(taken(), snap, ["prefill.flops>+1%"] * 999 + ["kv_bytes<-1%"])
    markdown = report.to_markdown()
    assert 10_000 < len(markdown) < COMMENT
    assert "| KV cache |" in markdown and "❌ FAIL" in markdown
    assert "and 940 more gates" in markdown and "more passes" in markdown
    assert re.search(r"- \d+ more changes are left out here", markdown)
    assert markdown.count("<details>") == markdown.count("</details>") == 2
    # The other graph still has its share.
    assert "<summary>decode" in markdown


def test_json_is_the_diff_with_gates() -> None:
    plain = json.loads(json.dumps(made("prefill.flops>+1%").to_json(), allow_nan=False))
    assert list(plain) == ["changed", "a", "b", "notes", "graphs", "cost", "parts", "kv", "passes", "gates"]
    assert [(g["gate"], g["ok"]) for g in plain["gates"]] == [("prefill.flops>+1%", True)]
    assert (plain["a"]["name"], plain["a"]["passes"]) == ("tiny", [])
    assert plain["a"]["sizes"]["batch"] == 1 and set(plain["a"]["versions"]) == {"foveate", "torch", "transformers"}


def test_the_page_is_made_from_the_same_data() -> None:
    page = made("kv_bytes<-1%").to_html()
    assert page.lower().lstrip().startswith("<!doctype html>")
    assert "kv_bytes&lt;-1%" in page


def test_sources_are_programs_models_snapshots_and_paths(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    path.write_text(taken(PIPELINE).to_text())
    by_file = diff_report(taken(), path).to_json()
    assert by_file == diff_report(taken(), str(path)).to_json() == made().to_json()
    live = diff_report(traced()[1], optimized(PIPELINE), **SIZES)
    assert live.to_json()["graphs"] == by_file["graphs"]
    assert live.to_json()["cost"] == by_file["cost"]


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"x\.json is no snapshot"):
        diff_report(taken(), tmp_path / "x.json")
    with pytest.raises(InputError, match="no quantity"):
        made("sparkle>1")


def test_failed_gates() -> None:
    report = made("prefill.flops>+1%", "kv_bytes<-1%")
    assert [g.gate.text for g in report.failed] == ["kv_bytes<-1%"]
