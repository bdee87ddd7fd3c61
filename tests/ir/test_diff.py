"""Diffs: empty exactly where two programs compute the same, and in words where they do not."""

from __future__ import annotations

import copy
import itertools
import json
import re
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.ir.diff import Diff, diff
from foveate.ir.diff.compare import change
from foveate.ir.diff.layers import Graph
from foveate.ir.diff.words import Change, Heads, parse_value, words_for_change
from foveate.ir.rewriter import Rewriter
from foveate.ir.snapshot import Snapshot, read_snapshot
from foveate.ir.snapshot.make import snapshot
from tests.ir.programs import FFN, HEADS, LAYERS, PIPELINES, fresh, once, pruned, traced

SIZES: dict[str, Any] = {"text_tokens": 7, "device": "cpu"}
ALL = PIPELINES[-1]


@once
def taken(pipeline: str = "", layers: int = LAYERS) -> Snapshot:
    return snapshot(pruned(pipeline, layers=layers) if pipeline else traced(layers=layers)[1], name="tiny", **SIZES)


def canonical(snap: Snapshot) -> Any:
    """The graphs with every name replaced by (layer, cell, place in the cell), cells apart from each other."""
    result = {}
    for name, data in snap.data["graphs"].items():
        graph = Graph.of(data)
        number = {}
        for layer, content in graph.layers.items():
            for cell, nodes in content.cells.items():
                number.update({(layer, node): (layer, cell, place) for place, node in enumerate(nodes)})
        cells: dict[Any, list[Any]] = {}
        for layer, content in graph.layers.items():
            for cell, nodes in content.cells.items():
                for node in nodes:
                    refs = [graph.resolve(ref, layer) for ref in node.refs]
                    named = [number[ref] if ref else text for ref, text in zip(refs, node.refs, strict=True)]
                    cells.setdefault((layer, cell), []).append((node.op, node.template, node.value, named))
        result[name] = cells
    return result


def changes(a: str, b: str, graph: str = "prefill", layers: int = LAYERS) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = diff(taken(a, layers), taken(b, layers)).to_json()["graphs"][graph]["changes"]
    return found


def told(a: str, b: str, graph: str = "prefill", layers: int = LAYERS) -> set[tuple[Any, ...]]:
    return {(*c["layers"], c["stream"], c["state"], c["what"], *c["by"]) for c in changes(a, b, graph, layers)}


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_program_does_not_differ_from_itself(pipeline: str) -> None:
    found = diff(taken(pipeline), read_snapshot(taken(pipeline).to_text()))
    plain = found.to_json()
    assert not found.changed and not plain["changed"]
    for graph in plain["graphs"].values():
        assert not graph["changed"] and graph["changes"] == []
        assert {cell["state"] for s in graph["sections"] for cell in s["cells"]} == {"same"}
    assert all(entry["change"] == 0 for entry in plain["cost"].values())
    assert plain["notes"] == []


@pytest.mark.parametrize(("a", "b"), list(itertools.combinations(PIPELINES, 2)))
def test_it_has_changed_exactly_if_the_canonical_graphs_differ(a: str, b: str) -> None:
    one, other = taken(a), taken(b)
    for x, y in ((one, other), (other, one)):
        found = diff(x, y)
        assert found.changed == (canonical(x) != canonical(y))
        for graph in found.to_json()["graphs"].values():
            assert graph["changed"] == bool(graph["changes"])
            assert graph["changed"] == any(c["state"] != "same" for s in graph["sections"] for c in s["cells"])


def test_every_layer_is_in_one_section_and_every_node_in_one_cell() -> None:
    one, other = taken(), taken(ALL)
    for name, graph in diff(one, other).to_json()["graphs"].items():
        layers = [n for s in graph["sections"] for n in range(s["layers"][0], s["layers"][1] + 1)]
        assert layers == list(range(-1, len(layers) - 1))
        for side, snap in (("a", one), ("b", other)):
            data = snap.data["graphs"][name]
            lines = 0
            for section in graph["sections"]:
                height = section["layers"][1] - section["layers"][0] + 1
                for cell in section["cells"]:
                    shown = cell["a"] if side == "b" and cell["state"] == "same" else cell[side]
                    lines += height * sum(not line.startswith("return ") for line in shown)
            nodes = sum((s["layers"][1] - s["layers"][0] + 1) * len(s["nodes"]) for s in data["sections"])
            assert lines == graph["nodes"][side] == nodes + len(data["inputs"])


def test_neurons() -> None:
    half = f"{FFN} -> {FFN // 2}"
    found = changes("", "drop-visual-neurons{keep=0.5}")
    assert {(c["what"], *c["by"]) for c in found} == {(half, "drop-visual-neurons")}
    assert {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"} <= set(found[0]["roles"])
    assert {c["stream"] for c in found} == {"visual"}


def test_heads() -> None:
    found = told("", "drop-visual-heads{keep=2,from_layer=0}")
    by = "drop-visual-heads"
    # The last layer has no visual queries: nobody would read what they give.
    assert (0, LAYERS - 2, "visual", "changed", "4 -> 2 heads", by) in found
    assert (0, 2, "text", "changed", "text: 2 heads see text only, 2 heads see visual and text", by) in found


def test_a_cut() -> None:
    found = told("", "cut-visual{from_layer=2}", layers=6)
    by = "cut-visual"
    assert (2, 5, "visual", "removed", "removed", by) in found
    assert (2, 5, "text", "changed", "text sees text only", by) in found
    assert (2, 5, "none", "changed", "visual keys and values no longer cached", by) in found
    whole = [c for c in changes("", "cut-visual{from_layer=2}", layers=6) if c["whole"]]
    assert [c["layers"] for c in whole] == [[2, 5]]
    assert not any(c["layers"][0] < 1 for c in changes("", "cut-visual{from_layer=2}", layers=6))
    back = told("cut-visual{from_layer=2}", "", layers=6)
    assert (2, 5, "visual", "added", "added", by) in back
    assert (2, 5, "text", "changed", "text sees visual and text", by) in back


def test_a_selection() -> None:
    found = told("", "fastv{layer=1,keep=0.5}", layers=6)
    by = "fastv"
    assert (1, 1, "visual", "added", "added: attention_row, sum, top_tokens", by) in found
    assert (1, 5, "visual", "changed", "visual_tokens -> floor(0.5*visual_tokens) tokens", by) in found
    assert (1, 5, "text", "changed", "reads top_tokens instead of visual_order", by) in found
    assert any(entry[4] == "returns kept_1" for entry in found)
    assert not any(entry[0] < 1 for entry in found)
    again = told("fastv{layer=1,keep=0.5}", "fastv{layer=1,keep=0.25}", layers=6)
    fewer = "floor(0.5*visual_tokens) -> floor(0.25*visual_tokens) tokens"
    assert again == {(1, 5, "visual", "changed", fewer, by)}


def test_each_change_is_by_the_pass_that_made_it() -> None:
    three = "drop-visual-heads{keep=2,from_layer=1},drop-visual-neurons{keep=0.5},cut-visual{from_layer=4}"
    for graph in ("prefill", "decode"):
        found = {c["what"]: c["by"] for c in changes("", three, graph, layers=6)}
        assert found["removed"] == ["cut-visual"]
        assert found["text sees text only"] == ["cut-visual"]
        assert found["2 -> 1 heads"] == ["drop-visual-heads"]
        if graph == "prefill":
            assert found[f"{FFN} -> {FFN // 2}"] == ["drop-visual-neurons"]
            assert found["visual keys and values no longer cached"] == ["cut-visual"]


def test_what_two_passes_without_traces_did_is_nobodys() -> None:
    pipeline = "drop-visual-neurons{keep=0.5},cut-visual{from_layer=2}"
    snap = copy.deepcopy(taken(pipeline, layers=6))

    def removed() -> list[list[str]]:
        graphs = diff(taken(layers=6), snap).to_json()["graphs"]
        return [c["by"] for c in graphs["prefill"]["changes"] if c["whole"]]

    assert removed() == [["cut-visual"]]
    snap.data["passes"].append({"text": "another{x=1}", "notes": [], "edits": {}, "skipped": "why", "cost": None})
    assert removed() == [["cut-visual"]]
    snap.data["passes"][-1]["skipped"] = None
    assert removed() == [[]]


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**32), pipeline=st.sampled_from(PIPELINES))
def test_names_alone_are_no_change(seed: int, pipeline: str) -> None:
    snap = copy.deepcopy(taken(pipeline))
    start = seed % 7 + 2

    def renamed(text: str) -> str:
        return re.sub(r"\b(l\d+_|pre_)?((?:visual|text)_[a-z]+\d?_)(\d+)\b", rf"\g<1>\g<2>{start}\g<3>", text)

    text = json.dumps(snap.data["graphs"])
    snap.data["graphs"] = json.loads(renamed(text))
    assert snap.data["graphs"] != taken(pipeline).data["graphs"]
    assert not diff(taken(pipeline), snap).changed
    assert not diff(snap, taken(pipeline)).changed


def test_the_order_of_cells_is_no_change() -> None:
    snap = copy.deepcopy(taken())
    for name in ("prefill", "decode"):
        for section in snap.data["graphs"][name]["sections"]:
            section["nodes"].sort(key=lambda node: node[2:4])
    assert not diff(taken(), snap).changed


def edited(pipeline: str, find: str, put: str, graph: str = "prefill") -> Diff:
    snap = copy.deepcopy(taken(pipeline))
    text = json.dumps(snap.data["graphs"][graph])
    assert find in text
    snap.data["graphs"][graph] = json.loads(text.replace(find, put))
    return diff(taken(pipeline), snap)


@pytest.mark.parametrize(
    ("find", "put", "said"),
    [
        ("self_attn.q_proj.weight", "self_attn.w.weight", "weight self_attn.q_proj.weight -> self_attn.w.weight"),
        ("1e-06", "1e-05", "add: 1e-06 -> 1e-05"),
        ("aten.silu.default", "aten.gelu.default", "silu -> gelu"),
        ("float32[batch, text_tokens, 48]", "bfloat16[batch, text_tokens, 48]", "float32 -> bfloat16"),
        ("[visual_transpose_3, text_transpose_3]", "[text_transpose_3, visual_transpose_3]", "reads other values"),
        ("mul.Tensor(text_silu_1, text_linear_6)", "mul.Tensor(text_linear_6, text_silu_1)", "reads linear instead"),
    ],
)  # fmt: skip
def test_small_changes_are_found_and_told(find: str, put: str, said: str) -> None:
    found = edited("", find, put)
    assert found.changed and found.graphs["prefill"].changed and not found.graphs["decode"].changed
    told = [c["what"] for c in found.to_json()["graphs"]["prefill"]["changes"]]
    assert any(said in text for text in told), told


def test_swapped_queries_and_keys_are_seen_though_both_look_the_same() -> None:
    find = "[l0_text_add_2], [l0_visual_add_3, l0_text_add_3]"
    find = find.replace("l0_", "")
    assert edited("", find, "[text_add_3], [visual_add_3, text_add_2]").changed


def test_a_node_that_comes_in_between_moves_no_other() -> None:
    program = fresh()
    graph = program.prefill
    edit = Rewriter(program, graph, "test")
    linear = next(n for n in graph.nodes if n.name == "l1_visual_linear_5")
    with edit.after(linear):
        new = edit.like(linear, linear.args)
        double = edit.call(torch.ops.aten.mul.Tensor, new, 2.0, about=linear.meta["foveate"])
    edit.replace(linear, double)
    edit.sweep()
    found = diff(taken(), snapshot(program, **SIZES)).to_json()["graphs"]["prefill"]
    (entry,) = [c for c in found["changes"] if c["roles"] == ["mlp.gate_proj"]]
    assert entry["layers"] == [1, 1] and "added: mul" in entry["what"]
    assert {r for c in found["changes"] for r in c["roles"]} <= {"mlp.gate_proj", "mlp.act_fn"}


@pytest.mark.slow
def test_models_of_different_depth() -> None:
    found = diff(taken(layers=6), taken(layers=8))
    plain = found.to_json()["graphs"]["prefill"]
    layers = [n for s in plain["sections"] for n in range(s["layers"][0], s["layers"][1] + 1)]
    assert layers == list(range(-1, 9))
    assert [c["layers"] for c in plain["changes"] if c["whole"]] == [[6, 7], [6, 7]]
    assert {c["state"] for c in plain["changes"] if c["whole"]} == {"added"}
    assert found.notes() == ["different models: layers is 6 and 8"]
    back = diff(taken(layers=8), taken(layers=6)).to_json()["graphs"]["prefill"]
    assert [c["layers"] for c in back["changes"] if c["whole"]] == [[6, 7], [6, 7]]
    # What follows the last layer is the same in both, but for what it reads.
    after = [c for c in plain["changes"] if c["layers"] == [8, 8]]
    assert {c["what"] for c in after} == {"reads other values"}


def test_a_graph_that_one_side_lacks() -> None:
    snap = copy.deepcopy(taken())
    del snap.data["graphs"]["decode"]
    found = diff(snap, taken()).to_json()["graphs"]["decode"]
    assert found["nodes"]["a"] == 0 and {c["state"] for c in found["changes"]} == {"added"}
    assert {c["state"] for c in diff(taken(), snap).to_json()["graphs"]["decode"]["changes"]} == {"removed"}


def test_notes_name_versions_sizes_and_passes_that_leave_no_trace() -> None:
    snap = copy.deepcopy(taken())
    snap.data["versions"]["torch"] = "2.1.0"
    snap.data["sizes"]["text_tokens"] = 9
    snap.data["passes"] = [{"text": "shuffle", "notes": [], "edits": {}, "skipped": None, "cost": None}]
    found = diff(taken(), snap)
    assert not found.changed
    notes = "\n".join(found.notes())
    assert f"made with torch {taken().data['versions']['torch']} and 2.1.0" in notes
    assert "text_tokens is 7 and 9" in notes
    assert "the passes are not" in notes


def test_programs_are_compared_as_they_are() -> None:
    found = diff(traced()[1], pruned("cut-visual{from_layer=1}"))
    assert found.changed
    cost = found.to_json()["cost"]
    assert cost["kv_bytes"]["b"] < cost["kv_bytes"]["a"] and cost["prefill.flops"]["change"] < 0
    assert cost["vision.flops"]["change"] == 0


def test_hostile_references_are_text() -> None:
    names = ["prev.prev.x", "l9_x", "prev.nothing", "x{l}", "input", "weight", "_", "lambda", "text_linear_1"]
    snap = copy.deepcopy(taken())
    for number, name in enumerate(names):
        graph = snap.data["graphs"]["prefill"]
        node = [f"h_{number}", f"aten.neg.default({name}, [{name}], k={name})", "text", "mlp", "split", "]["]
        graph["sections"][number % len(graph["sections"])]["nodes"].append(node)
    snap = read_snapshot(snap.to_text())
    assert not diff(snap, snap).changed
    assert diff(taken(), snap).changed
    json.dumps(diff(taken(), snap).to_json(), allow_nan=False)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), pipeline=st.sampled_from(PIPELINES))
def test_any_edit_is_a_change_exactly_if_the_canonical_graphs_differ(data: st.DataObject, pipeline: str) -> None:
    snap = copy.deepcopy(taken(pipeline))
    for _ in range(data.draw(st.integers(1, 3), "edits")):
        sections = snap.data["graphs"][data.draw(st.sampled_from(("prefill", "decode", "vision")), "graph")]["sections"]
        nodes = data.draw(st.sampled_from(sections), "section")["nodes"]
        if not nodes:
            continue
        place = data.draw(st.integers(0, len(nodes) - 1), "place")
        node, other = nodes[place], data.draw(st.sampled_from(nodes), "other")
        match data.draw(st.sampled_from(("drop", "repeat", "rewire", "value", "swap", "number", "returned")), "kind"):
            case "drop":
                del nodes[place]
            case "repeat":
                nodes.insert(place, [f"again_{len(nodes)}_{place}", *other[1:]])
            case "rewire":
                words = re.findall(r"(?:text|visual)_\w+", node[1]) or ["text"]
                node[1] = node[1].replace(words[-1], other[0])
            case "value":
                node[5] = other[5]
            case "swap":
                nodes[place], nodes[0] = nodes[0], nodes[place]
            case "number":
                node[1] = node[1].replace("2", "3")
            case "returned":
                kv = snap.data["graphs"]["prefill"]["returns"]["kv"]
                kv[0]["values"][2] = other[0]
    assert diff(taken(pipeline), snap).changed == (canonical(taken(pipeline)) != canonical(snap))


def test_a_model_that_lies_about_its_layers() -> None:
    snap = copy.deepcopy(taken())
    snap.data["model"]["layers"] = 1 << 60
    assert not diff(snap, copy.deepcopy(snap)).changed
    snap.data["model"]["layers"] = 1
    nodes = snap.data["graphs"]["prefill"]["sections"][-1]["nodes"]
    nodes[0][1] = "aten.neg.default(text)"
    found = diff(taken(), snap)
    assert found.changed
    assert found.to_json()["graphs"]["prefill"]["nodes"]["a"] == found.to_json()["graphs"]["prefill"]["nodes"]["b"]


def test_many_equal_nodes_take_no_time() -> None:
    def with_nodes(count: int) -> Snapshot:
        snap = copy.deepcopy(taken())
        nodes = [[f"n_{k}", "aten.neg.default(text)", "text", "mlp", "split", "int64[1]"] for k in range(count)]
        snap.data["graphs"]["prefill"]["sections"][1]["nodes"] = nodes
        return snap

    assert diff(with_nodes(5000), with_nodes(4999)).changed


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("float32[batch, floor(0.5*visual_tokens), 8]", ["batch", "floor(0.5*visual_tokens)", "8"]),
        ("int64[Max(1, 2), 3]", ["Max(1, 2)", "3"]),
        ("2 values", []),
        ("", []),
        ("][,", ["", ""]),
    ],
)
def test_sizes_of_a_value(text: str, sizes: list[str]) -> None:
    assert parse_value(text)[1] == sizes


@pytest.mark.parametrize(
    ("change", "role", "words"),
    [
        (Change("4096", "2048", True), "attn.q", "32 -> 16 heads"),
        (Change("32", "16", False), "attn", "32 -> 16 heads"),
        (Change("4096", "2048", True), "mlp.up", "4096 -> 2048"),
        (Change("past_tokens", "text_tokens", False), "mlp", "past_tokens -> text_tokens tokens"),
        (Change("float32", "bfloat16", False), "mlp", "float32 -> bfloat16"),
        (Change("4096", "2000", True), "attn.q", "4096 -> 2000"),
        (Change("visual_tokens", "floor(0.5*n)", False), "mlp", "visual_tokens -> floor(0.5*n) tokens"),
    ],
)  # fmt: skip
def test_words_for_sizes(change: Change, role: str, words: str) -> None:
    assert words_for_change(change, role, Heads(frozenset({"attn.q", "attn.k"}), 128)) == words


@pytest.mark.parametrize(
    ("a", "b", "share"), [(100, 101, 0.01), (0, 0, 0.0), (0, 5, None), (None, 5, None), (5, None, None), (2, 0, -1.0)]
)
def test_relative_changes(a: float | None, b: float | None, share: float | None) -> None:
    assert change(a, b) == share


def test_rows_of_a_projection_are_told_as_heads() -> None:
    """A head is 8 wide here, and both programs have dropped some."""
    few, more = (snapshot(pruned(f"drop-visual-heads{{keep={n},from_layer=0}}")) for n in (1, 2))
    told = [change["what"] for change in diff(few, more).to_json()["graphs"]["prefill"]["changes"]]
    heads = [what for what in told if what.endswith(" heads") and "see" not in what]
    assert heads
    assert all(int(n) <= HEADS for what in heads for n in re.findall(r"\d+", what)), heads
