"""The diff page in a real browser: nothing hostile runs, and mouse, keys, search and small windows work."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foveate.report.page import diff_page
from tests.report.page_browser import CONTRAST, NAMES, Page, browser, browser_path
from tests.report.page_data import hostile, large, real, small

PATH = browser_path()
pytestmark = pytest.mark.skipif(PATH is None, reason=f"no browser here: needs one of {', '.join(NAMES)}")

FOCUSED = "document.activeElement.textContent"
TITLE = "document.querySelector('#details-title').textContent"
CLOSED = "document.querySelector('#details').hidden"
SEEN = "[...document.querySelectorAll('button.box')].filter((box) => box.offsetParent).map((box) => box.textContent)"
TOLD = "document.querySelector('#told').textContent"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    assert PATH is not None
    with browser(PATH, tmp_path_factory.mktemp("profile")) as page:
        yield page


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    diffs: dict[str, dict[str, Any]] = {"small": small(), "hostile": hostile(), "large": large(), "real": real()}
    for name, diff in diffs.items():
        (folder / f"{name}.html").write_text(diff_page(diff), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in diffs}


@pytest.fixture
def page(chromium: Page, files: dict[str, Path]) -> Page:
    chromium.open(files["small"])
    return chromium


@pytest.mark.parametrize("name", ["small", "hostile", "large", "real"])
def test_the_page_is_quiet_and_asks_for_nothing(chromium: Page, files: dict[str, Path], name: str) -> None:
    chromium.open(files[name])
    chromium.click("button.box.changed")
    assert not chromium.run(CLOSED)
    assert chromium.told == []
    assert chromium.requests == [files[name].as_uri()]


def test_hostile_text_stays_text_everywhere(chromium: Page, files: dict[str, Path]) -> None:
    chromium.open(files["hostile"])
    for number in range(chromium.run("document.querySelectorAll('[role=tab]').length")):
        chromium.run(f"document.querySelector('#tab-{number}').click()")
        chromium.run(f"document.querySelectorAll('#panel-{number} button.box').forEach((box) => box.click())")
        assert not chromium.run(CLOSED)
    assert chromium.run("typeof window.__pwned") == "undefined"
    assert chromium.run("document.querySelectorAll('img, iframe, link, [onmouseover], [onerror]').length") == 0
    assert chromium.run("document.querySelectorAll('script').length") == 2
    assert chromium.run("({}).polluted === undefined && Object.keys(Object.prototype).length === 0")
    assert "<script>window.__pwned = 1</script>" in chromium.run("document.querySelector('#details').textContent")
    assert chromium.told == []


def test_the_policy_stops_what_is_put_in_later(page: Page) -> None:
    page.run("document.body.append(Object.assign(document.createElement('script'), {text: 'window.__pwned = 1'}))")
    page.run("document.body.insertAdjacentHTML('beforeend', '<img src=http://localhost:9/x onerror=alert(1)>')")
    page.run("document.body.setAttribute('style', 'color: red')")
    assert page.run("typeof window.__pwned") == "undefined"
    assert page.run("getComputedStyle(document.body).color") != "rgb(255, 0, 0)"
    assert sum("Content Security Policy" in told for told in page.told) >= 3


def test_a_click_shows_lines_before_and_after_with_what_differs(page: Page) -> None:
    assert page.run(CLOSED)
    page.click("button.box.changed")
    assert not page.run(CLOSED)
    assert page.run(TITLE) == "~changed: mlp.gate_proj"
    facts = page.run("document.querySelector('#details .facts').textContent")
    assert "layers 0\u20131" in facts and "11008 \u2192 5504" in facts and "by drop-visual-neurons" in facts
    rows = page.run(
        "[...document.querySelectorAll('#details tbody tr')].map((r) => [...r.cells].map((c) => c.textContent))"
    )
    assert len(rows) == 3
    assert rows[0][0].endswith("bfloat16[batch, n, 11008]") and rows[0][1].endswith("bfloat16[batch, n, 5504]")
    assert rows[2] == ["", "+added: extra_1 = aten.neg.default(x)"]
    marks = page.run("[...document.querySelectorAll('#details tr:first-child mark')].map((m) => m.textContent)")
    assert marks == ["split", "11008", "drop-visual-neurons", "5504"]
    page.click("button.box.changed")
    assert page.run(CLOSED)


def test_lines_of_one_op_face_each_other(chromium: Page, tmp_path: Path) -> None:
    diff = small()
    cell = diff["graphs"]["prefill"]["sections"][1]["cells"][1]
    cell["a"] = ["x_1 = mul(p_1) ; f[32]", "x_2 = add(x_1) ; f[32]", "x_3 = neg(x_2) ; f[1]", "x_4 = mul(x_3) ; f[32]"]
    cell["b"] = ["t_1 = take(p_1) ; f[9]", "x_1 = mul(t_1) ; f[16]", "x_3 = neg(x_1) ; f[1]", "x_4 = mul(x_3) ; f[16]"]
    (tmp_path / "lines.html").write_text(diff_page(diff), encoding="utf-8")
    chromium.open(tmp_path / "lines.html")
    chromium.click("button.box.changed")
    rows = chromium.run(
        "[...document.querySelectorAll('#details tbody tr')]"
        ".map((r) => [...r.cells].map((c) => c.querySelector('code')?.textContent.split(' ')[2] ?? ''))"
    )
    assert rows == [
        ["", "take(p_1)"],
        ["mul(p_1)", "mul(t_1)"],
        ["add(x_1)", ""],
        ["neg(x_2)", "neg(x_1)"],
        ["mul(x_3)"] * 2,
    ]


def test_search_narrows_and_says_how_many(page: Page) -> None:
    assert page.run(TOLD).startswith("12 boxes in prefill")
    page.press("/")
    assert page.run("document.activeElement.id") == "search"
    page.type("Q_PROJ visual")
    assert page.run(SEEN) == ["=same: self_attn.q_proj", "\u2212removed: self_attn.q_proj"]
    assert page.run(TOLD) == "2 of 12 boxes match in prefill."
    assert page.run("document.querySelector('#tab-0').textContent") == "vision 0/1"
    for words, found in (("cut-visual", 2), ("aten.neg", 2), ("nothing like this", 0), (" ", 12)):
        page.run("document.querySelector('#search').select()")
        page.type(words)
        assert len(page.run(SEEN)) == found, words


def test_only_changed_hides_the_rest(page: Page) -> None:
    page.click("#only-changed")
    assert len(page.run(SEEN)) == 4
    assert not any(text.startswith("=") for text in page.run(SEEN))
    assert page.run("[...document.querySelectorAll('#panel-1 tbody tr')].filter((row) => !row.hidden).length") == 2
    page.click("#only-changed")
    assert len(page.run(SEEN)) == 12


def test_the_keyboard_reaches_and_moves_between_boxes(page: Page) -> None:
    page.press("/")
    page.press("Tab")
    assert page.run("document.activeElement.id") == "only-changed"
    page.press("Tab")
    assert page.run(FOCUSED) == "=same: rotary_emb"
    for key, text in (
        ("ArrowRight", "=same: rotary_emb"),
        ("ArrowRight", "=same: prefix"),
        ("Home", "=same: rotary_emb"),
        ("ArrowDown", "=same: self_attn.q_proj"),
        ("ArrowRight", "~changed: mlp.gate_proj11008 \u2192 5504"),
        ("ArrowDown", "\u2212removed: self_attn.q_proj"),
        ("ArrowUp", "=same: self_attn.q_proj"),
        ("End", "=same: lm_head"),
        ("ArrowDown", "=same: lm_head"),
    ):
        page.press(key)
        assert page.run(FOCUSED).startswith(text), key
    assert page.run("document.querySelectorAll('#panel-1 button.box[tabindex=\"0\"]').length") == 1
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_enter_opens_arrows_follow_and_escape_closes(page: Page) -> None:
    page.run("document.querySelector('button.box.changed').focus()")
    page.press("Enter")
    assert page.run(TITLE) == "~changed: mlp.gate_proj"
    assert page.run("document.activeElement.getAttribute('aria-expanded')") == "true"
    page.press("ArrowDown")
    assert page.run(TITLE) == "\u2212removed: self_attn.q_proj"
    assert page.run("document.querySelectorAll('[aria-expanded=true]').length") == 1
    page.press("Tab")
    assert page.run(FOCUSED) == "Close"
    page.press("Escape")
    assert page.run(CLOSED)
    assert page.run(FOCUSED).startswith("\u2212removed: self_attn.q_proj")


def test_tabs_turn_by_key_and_close_the_details(page: Page) -> None:
    assert page.run("document.querySelector('[aria-selected=true]').textContent") == "prefill 12"
    page.click("button.box.changed")
    page.run("document.querySelector('[aria-selected=true]').focus()")
    page.press("ArrowRight")
    assert page.run(FOCUSED) == "decode 1"
    assert page.run(CLOSED)
    assert page.run(SEEN) == ["=same: mlp"]
    page.press("ArrowRight")
    assert page.run(FOCUSED) == "vision 1"


def test_a_change_of_the_list_leads_to_its_box(page: Page) -> None:
    page.run("document.querySelector('#tab-2').click()")
    page.click("table.changes tbody tr:nth-child(4) button.show")
    assert page.run(TITLE) == "+added: select"
    assert page.run(FOCUSED).startswith("+added: select")


@pytest.mark.parametrize("name", ["small", "hostile", "real"])
@pytest.mark.parametrize("width", [375, 760, 1400])
def test_no_window_scrolls_sideways(chromium: Page, files: dict[str, Path], name: str, width: int) -> None:
    chromium.open(files[name], width=width, height=800)
    chromium.click("button.box.changed")
    shown = "document.documentElement"
    assert chromium.run(f"{shown}.scrollWidth <= {shown}.clientWidth"), chromium.run(f"{shown}.scrollWidth")
    top = chromium.run("document.querySelector('#details').getBoundingClientRect().top")
    box = chromium.run("document.querySelector('button.box[aria-expanded=true]').getBoundingClientRect().toJSON()")
    assert box["top"] >= 0 and (name == "hostile" or box["bottom"] <= top), "the box stays in sight above its details"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_colour_schemes(chromium: Page, files: dict[str, Path], scheme: str) -> None:
    chromium.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    try:
        chromium.open(files["small"])
        chromium.click("button.box.changed")
        back = chromium.run("getComputedStyle(document.body).backgroundColor")
        assert (scheme == "dark") == (sum(map(int, back.removeprefix("rgb(").rstrip(")").split(","))) < 200)
        for selector in (
            ".box",
            ".quiet",
            ".state",
            ".change",
            ".mark",
            "a",
            "#details td",
            "[role=tab]",
            "del",
            "ins",
        ):
            found = chromium.run(f"({CONTRAST})({json.dumps(selector)})")
            assert found and min(found) >= 4.5, (selector, min(found))
    finally:
        chromium.call("Emulation.setEmulatedMedia", features=[])


def test_states_differ_by_more_than_colour(page: Page) -> None:
    signs = page.run("[...document.querySelectorAll('.states [aria-hidden]')].map((e) => e.textContent)")
    assert signs == ["=", "~", "\u2212", "+"]
    kind = "((s) => `${s.borderTopStyle} ${s.borderTopWidth}`)(getComputedStyle(document.querySelector('.box.%s')))"
    assert len({page.run(kind % state) for state in ("changed", "removed", "added")}) == 3


def test_every_control_has_a_name_and_a_role(page: Page) -> None:
    page.call("Accessibility.enable")
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    wanted = {"button", "tab", "searchbox", "checkbox", "link", "table", "tablist", "region"}
    # Some versions of the browser keep the space around a label's text.
    found = [(n["role"]["value"], n.get("name", {}).get("value", "").strip()) for n in nodes if not n.get("ignored")]
    for role, name in found:
        assert role not in {"button", "tab", "searchbox", "checkbox", "link"} or name, role
    assert {role for role, _ in found} >= wanted
    assert ("searchbox", "Search") in found and ("checkbox", "only changed") in found


def test_without_a_script_the_words_still_stand(chromium: Page, files: dict[str, Path]) -> None:
    chromium.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        chromium.open(files["small"])
        seen = chromium.run("document.body.innerText")
        for words in ("The graph is drawn by a script", "1 of 2 gates failed", "drop-visual-neurons", "mlp.gate_proj"):
            assert words in seen
    finally:
        chromium.call("Emulation.setScriptExecutionDisabled", value=False)


def test_a_printed_page_shows_the_graph_and_no_controls(page: Page) -> None:
    page.click("button.box.changed")
    page.call("Emulation.setEmulatedMedia", media="print")
    try:
        seen = page.run("document.body.innerText")
        assert "only changed" not in seen and "aten.linear" not in seen and "Search" not in seen
        assert "mlp.gate_proj" in seen and "Cost by layer" in seen
        page.call("Emulation.setDeviceMetricsOverride", width=720, height=900, deviceScaleFactor=1, mobile=False)
        highest = "Math.max(...[...document.querySelectorAll('.changes tr')].map((row) => row.offsetHeight))"
        assert page.run(highest) < 100, "no column is squeezed on paper"
    finally:
        page.call("Emulation.setEmulatedMedia", media="")


def test_a_large_page_opens_and_searches_without_lag(chromium: Page, files: dict[str, Path]) -> None:
    chromium.open(files["large"])
    timing = "performance.getEntriesByType('navigation')[0]"
    assert chromium.run(f"{timing}.loadEventEnd") < 3000
    assert len(chromium.run(SEEN)) == 32 * 26
    spent = chromium.run(
        "((s) => { const t = performance.now(); s.value = 'mlp'; s.dispatchEvent(new Event('input'));"
        " document.body.offsetHeight; return performance.now() - t })(document.querySelector('#search'))"
    )
    assert spent < 400
    assert chromium.run(TOLD).startswith(f"{32 * 10} of {32 * 26}")
