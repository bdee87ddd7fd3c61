"""The diff page as a document: what stands in it without any script, and that data stays text."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import tomllib
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from foveate.ir.diff.gates import Gate, GateResult
from foveate.report.page.document import SCRIPTS, diff_page
from foveate.report.page.figures import change_text, duration, layers_text, number, shown
from foveate.report.page.markup import plain, tag
from tests.report.page_data import HOSTILE, figure, hostile, large, part, real, small
from tests.report.page_document import Document


@pytest.fixture(scope="module")
def page() -> Document:
    return Document(diff_page(small()))


def test_the_page_is_one_document_with_headings_in_order(page: Document) -> None:
    assert page.names()[:2] == ["html", "head"]
    levels = [int(name[1]) for name in page.names() if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] for name, a in page.tags if name == "a"]
    assert links and all(link and link.removeprefix("#") in ids for link in links)
    assert page.texts["title"][0] == "Graph diff: llava-1.5-7b \u2192 llava-1.5-7b"


def test_everything_but_the_graph_stands_there_without_a_script(page: Document) -> None:
    for words in (
        "1 of 3 graphs differ; 1 of 2 gates failed.",
        "cut-visual{from_layer=2}",
        "made with torch 2.12.0 and 2.13.0",
        "prefill FLOPs 2.6T \u221268.3% from 8.2T",
        "predicted time 8.5 \u00b5s 9.5 \u00b5s +11.8%",
        "KV cache 318 MiB 173 MiB \u221245.6%",
        "peak memory 0 B 13 GiB new",
        "nodes 4,012 2,101 \u221247.6%",
        "passed prefill.flops>+1% \u221268.30%",
        "failed decode.time_s>+1% +11.76%",
        "~ changed layers 0\u20131 visual mlp.gate_proj 11008 \u2192 5504 drop-visual-neurons",
        "+ added layers 2\u20133 text select added: attention_row, top_tokens fastv",
        "layers 2\u20133 bfloat16[batch, 32, visual_tokens, 128] becomes nothing",
        "skipped keep=1 keeps every visual token",
        "layers 0 to 1: visual gate/up/down",
        "prefill FLOPs 8.2T \u2192 5.1T (\u221237.8%)",
        "before layers 0\u20133 visual 300G",
    ):
        assert words in page.visible, words


def test_nothing_comes_from_anywhere_else() -> None:
    text = diff_page(small())
    assert not re.search(r"https?:|//[a-z]|url\(|@import|\bfetch\b|XMLHttp|WebSocket|innerHTML|\beval\b", text)
    for name, attributes in Document(text).tags:
        assert not {"src", "style", "srcdoc", "data", "action"} & set(attributes), name
        assert not [key for key in attributes if key.startswith("on")], name
    assert not {"link", "iframe", "object", "img", "base", "form"} & set(Document(text).names())


@pytest.mark.parametrize("diff", [small(), hostile()], ids=["small", "hostile"])
def test_the_policy_lets_in_this_style_and_this_script_only(diff: dict[str, Any]) -> None:
    document = Document(diff_page(diff))
    policies = [a["content"] for n, a in document.tags if n == "meta" and a.get("http-equiv")]
    assert len(policies) == 1 and policies[0] is not None
    rules = dict(rule.split(" ", 1) for rule in policies[0].split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert set(rules) == {"default-src", "script-src", "style-src", "base-uri", "form-action"}
    scripts = [
        t for t, (_, a) in zip(document.texts["script"], _all(document, "script"), strict=True) if "type" not in a
    ]
    assert rules["script-src"] == "'" + _hash(*scripts) + "'"
    assert rules["style-src"] == "'" + _hash(*document.texts["style"]) + "'"
    assert document.names().index("meta") < document.names().index("style")


def _all(document: Document, wanted: str) -> list[tuple[str, dict[str, str | None]]]:
    return [entry for entry in document.tags if entry[0] == wanted]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def test_assets_can_stand_inside_their_elements() -> None:
    assets = resources.files("foveate.report.page") / "assets"
    texts = {entry.name: entry.read_text(encoding="utf-8") for entry in assets.iterdir()}
    assert set(texts) == {"page.html", "page.css", *SCRIPTS}
    assert sum(map(len, texts.values())) < 50_000
    for name, text in texts.items():
        assert text.isascii() and "\r" not in text, name
        assert name == "page.html" or not re.search(r"</|<!--", text), name


def test_hostile_text_makes_no_element() -> None:
    kind, other = Document(diff_page(small())), Document(diff_page(hostile()))
    assert set(other.names()) == set(kind.names())
    assert other.names().count("script") == 2
    known = {key for _, attributes in kind.tags for key in attributes}
    assert {key for _, attributes in other.tags for key in attributes} <= known
    seen = plain(HOSTILE).replace("\n", " ")
    for before in ("llava-1.5-7b", "cut-visual{from_layer=2}", "prefill.flops>+1%", "mlp.gate_proj", "fastv"):
        assert f"{before}{seen}" in other.visible, before
    assert "$title" in other.visible and "Graph diff: " in other.texts["title"][0]


def test_hostile_data_reads_back_as_it_is_shown() -> None:
    text = diff_page(hostile())
    text.encode("utf-8")
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert block and not re.search(r"[<>&\u2028\u2029]|[^ -~]", block[1])
    graphs = json.loads(block[1])
    assert [g["name"] for g in graphs] == [*(n + plain(HOSTILE) for n in ("vision", "prefill", "decode")), "__proto__"]
    assert graphs[1]["sections"][1]["cells"][1]["what"] == "11008 -> 5504" + plain(HOSTILE)


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("l0 \u00e9\u6f22 \U0001f600\n", "l0 \u00e9\u6f22 \U0001f600\n"),
        ("a\u202eb\u2066c", "a\\u202eb\\u2066c"),
        ("\x00\x1b[0m\x7f\u200b\ufeff", "\\u0000\\u001b[0m\\u007f\\u200b\\ufeff"),
        ("\ud800\u2028\U000e0041", "\\ud800\\u2028\\U000e0041"),
    ],
)
def test_what_cannot_be_seen_is_shown_by_number(text: str, seen: str) -> None:
    assert plain(text) == seen


def test_elements_escape_text_and_attributes() -> None:
    built = tag("td", "<b>", [tag("code", "&")], None, class_="a", title='"<', hidden=True, tabindex=0, open=False)
    assert built == '<td class="a" title="&quot;&lt;" hidden tabindex="0">&lt;b&gt;<code>&amp;</code></td>'


def test_making_a_page_changes_nothing_and_is_repeatable() -> None:
    diff = hostile()
    before = copy.deepcopy(diff)
    assert diff_page(diff) == diff_page(diff)
    assert diff == before


def test_a_diff_without_any_change_says_so() -> None:
    diff = small()
    for graph in diff["graphs"].values():
        graph.update(changed=False, changes=[])
    diff.update(changed=False, gates=[], notes=[], parts={}, kv={"a": [], "b": []}, cost={})
    seen = Document(diff_page(diff)).visible
    assert "The graphs are the same." in seen
    assert "No gates were asked for." in seen and "holds no cost by layer" in seen and "holds no cache" in seen
    assert Document(diff_page({**diff, "graphs": {}})).visible.count("No change.") == 0


def test_versions_and_sizes_are_told_where_the_diff_has_them() -> None:
    diff = small()
    diff["a"].update(versions={"torch": "2.12.0"}, sizes={"visual_tokens": 576, "device": "cpu"})
    seen = Document(diff_page(diff)).visible
    assert "torch 2.12.0" in seen and "visual tokens 576, device cpu" in seen


def test_figures_out_of_any_range_are_shown() -> None:
    diff = small()
    diff["cost"] = {
        "prefill.flops": {"a": 10**400, "b": 1, "change": None},
        "kv_bytes": {"a": None, "b": 5, "change": None},
        "peak_bytes": {"a": 0, "b": 0, "change": None},
    }
    diff["gates"] = [GateResult(Gate.of("kv_bytes>+1%"), None, False).to_json()]
    diff["parts"]["prefill"]["a"] = [part(0, 10**12, "visual", 1e9), part(0, 0, "text", float("nan"))]
    seen = Document(diff_page(diff)).visible
    assert "FLOPs \u221e 1 -" in seen
    assert "KV cache - 5 B new" in seen
    assert "peak memory 0 B 0 B no change" in seen
    assert "kv_bytes>+1% \u221e" in seen
    assert "layers are too many to draw" in seen


@pytest.mark.parametrize(
    ("gate", "value", "seen"),
    [
        ("prefill.flops > 2e12", 2.6e12, "2.6T"),
        ("kv_bytes>+100MiB", 2**20 * 120.0, "+120 MiB"),
        ("kv_bytes<=-5%", -0.25, "\u221225.00%"),
        ("prefill.nodes>4000", 4012, "4,012"),
        ("decode.time_s>+1", -0.002, "\u22122 ms"),
    ],
)
def test_a_gate_value_has_the_unit_of_its_bound(gate: str, value: float, seen: str) -> None:
    diff = {**small(), "gates": [GateResult(Gate.of(gate), value, True).to_json()]}
    assert f"passed {gate} {seen} Changes" in Document(diff_page(diff)).visible


def test_figures_in_words() -> None:
    assert [duration(s) for s in (0, 8.5e-6, 0.0123, 2.5, 42.0)] == [
        "0 ms",
        "8.5 \u00b5s",
        "12.3 ms",
        "2500 ms",
        "42 s",
    ]
    assert [number(v) for v in (True, "1", None, float("nan"), 3)] == [None, None, None, None, 3.0]
    assert [change_text(c, 2, 3) for c in (0.5, -0.001, 12.0)] == ["+50.0%", "\u22120.1%", "+1200%"]
    assert [shown(n, 2048) for n in ("kv_bytes", "a.nodes", "a.flops")] == ["2 KiB", "2,048", "2.05k"]
    assert [layers_text(x, 4) for x in ((-1, -1), (0, 0), (1, 3), (4, 4), (-1, 2))] == [
        "inputs", "layer 0", "layers 1\u20133", "output", "layers -1\u20132",
    ]  # fmt: skip


def test_bars_are_as_long_as_their_figures_say() -> None:
    diff = small()
    diff["cost"] = {"prefill.flops": figure(4.0, 1.0)}
    widths = re.findall(r'<rect x="0" y="(?:1|8)" width="([\d.]+)"', diff_page(diff))
    assert ["100.00", "25.00"] in [widths[i : i + 2] for i in range(0, len(widths), 2)]


def test_each_layer_has_its_stacks_in_the_chart() -> None:
    text = diff_page(small())
    svg = re.search(r'<svg class="layers".*?</svg>', text, re.DOTALL)
    assert svg
    heights = {title: float(h) for h, title in re.findall(r'v([\d.]+)h-3.8z" [^>]*><title>(.*?)</title>', svg[0])}
    assert len(heights) == (4 + 4 + 1) + (2 + 4 + 1)
    most = 300e9 + 30e9
    assert heights["layer 2, A, visual: 300GFLOPs"] == pytest.approx(100 * 300e9 / most, abs=0.01)
    assert heights["layer 1, B, visual: 200GFLOPs"] == pytest.approx(100 * 200e9 / most, abs=0.01)
    assert "layer 2, B, visual: 200GFLOPs" not in heights


def test_many_changes_are_folded_and_a_large_page_stays_small() -> None:
    diff = large()
    text = diff_page(diff)
    assert len(text) < 1.2 * len(json.dumps(diff)) + 200_000
    details = [a for name, a in Document(text).tags if name == "details"]
    assert details and not any("open" in attributes for attributes in details)
    assert any("open" in a for name, a in Document(diff_page(small())).tags if name == "details")


def test_a_real_diff_is_told() -> None:
    seen = Document(diff_page(real())).visible
    assert "2 of 3 graphs differ." in seen
    for words in (
        "drop-visual-neurons",
        "48 \u2192 24",
        "cut-visual{from_layer=2}",
        "text sees text only",
        "removed layer",
    ):
        assert words in seen, words
    assert "\u221e" not in seen and "None" not in seen


def test_the_assets_are_shipped() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert "report/page/assets/*" in project["tool"]["setuptools"]["package-data"]["foveate"]
