"""Snapshots: stable to the byte, equal layers folded, and read with care."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.errors import ArtifactError, InputError
from foveate.ir.cost import breakdown, cost_of
from foveate.ir.program import NodeInfo, PassRecord
from foveate.ir.rewriter import Rewriter
from foveate.ir.snapshot import Snapshot, read_snapshot
from foveate.ir.snapshot.check import MAX_BYTES
from foveate.ir.snapshot.graph import weight_path
from foveate.ir.snapshot.make import snapshot
from tests.ir.programs import FFN, LAYERS, PIPELINES, fresh, once, pruned, traced

SIZES: dict[str, Any] = {"text_tokens": 7, "device": "cpu"}


@once
def taken(pipeline: str = "", layers: int = LAYERS) -> Snapshot:
    return snapshot(pruned(pipeline, layers=layers) if pipeline else traced(layers=layers)[1], name="tiny", **SIZES)


def sections(snap: Snapshot, graph: str = "prefill") -> dict[tuple[int, int], list[list[str]]]:
    return {tuple(s["layers"]): s["nodes"] for s in snap.data["graphs"][graph]["sections"]}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_what_is_written_is_read_back_to_the_byte(pipeline: str) -> None:
    snap = taken(pipeline)
    text = snap.to_text()
    assert read_snapshot(text).data == snap.data
    assert list(json.loads(text)) == list(snap.data)
    assert read_snapshot(text) == snap
    assert read_snapshot(text).to_text() == text


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_node_is_there_once_in_its_own_order(pipeline: str) -> None:
    program = pruned(pipeline) if pipeline else traced()[1]
    for name, graph in program.graphs.items():
        data = taken(pipeline).data["graphs"][name]
        nodes = [n for n in graph.nodes if n.op in ("call_function", "placeholder")]
        counted = sum((b - a + 1) * len(s["nodes"]) for s in data["sections"] for a, b in [s["layers"]])
        assert counted + len(data["inputs"]) == len(nodes)
        covered = [n for s in data["sections"] for n in range(s["layers"][0], s["layers"][1] + 1)]
        assert (
            covered
            == sorted(set(covered))
            == sorted(
                {n.meta["foveate"].layer for n in nodes if n.op == "call_function"}
                | {n.meta["foveate"].layer for n in nodes if n.meta["foveate"].layer >= 0}
            )
        )


def test_equal_layers_fold_and_others_do_not() -> None:
    snap = taken(layers=6)
    assert list(sections(snap)) == [(-1, -1), (0, 0), (1, 3), (4, 4), (5, 5), (6, 6)]
    cut = taken("drop-visual-neurons{keep=0.5},cut-visual{from_layer=3}", layers=6)
    assert (3, 3) in sections(cut) and (1, 1) in sections(cut) and (1, 3) not in sections(cut)


def test_names_are_relative_and_what_is_read_far_away_is_not() -> None:
    nodes = {n[0]: n for n in sections(taken(layers=6))[1, 3]}
    assert nodes["visual_linear_5"][1:] == [
        'aten.linear.default(visual_mul_8, weight("model.language_model.layers.{l}.mlp.gate_proj.weight"))',
        "visual",
        "mlp.gate_proj",
        "split",
        f"float32[batch, visual_tokens, {FFN}]",
    ]
    assert "prev.visual_add_6" in nodes["visual_pow_1"][1]
    assert "l0_visual_unsqueeze_1" in nodes["visual_mul_3"][1]
    assert "l0_visual_unsqueeze_1" in {n[0] for n in sections(taken(layers=6))[0, 0]}


def test_every_reference_can_be_followed() -> None:
    for pipeline in PIPELINES:
        for graph in taken(pipeline).data["graphs"].values():
            known = {n[0] for n in graph["inputs"]} | {n[0] for s in graph["sections"] for n in s["nodes"]}
            for section in graph["sections"]:
                for _, call, *_ in section["nodes"]:
                    for word in call.replace("prev.", "").replace("[", " ").replace("(", " ").split():
                        name = word.strip(",)]")
                        if name.startswith(("visual_", "text_", "l0_", "pre_")) and not call.startswith("input"):
                            assert name in known, call


def test_returns_name_keys_and_values_by_layer() -> None:
    returns = taken("cut-visual{from_layer=1}").data["graphs"]["prefill"]["returns"]
    assert [row["layers"] for row in returns["kv"]] == [[0, 0], [1, 2]]
    assert returns["kv"][1]["values"][:2] == [None, None]
    assert returns["logits"].startswith(f"l{LAYERS}_text_linear")
    assert set(taken("fastv{layer=1,keep=0.5}").data["graphs"]["prefill"]["returns"]["kept"]) == {"1"}


def test_cache_inputs_of_the_decode_graph_fold_too() -> None:
    nodes = [n for s in taken(layers=6).data["graphs"]["decode"]["sections"] for n in s["nodes"]]
    assert {n[0] for n in nodes if n[0].startswith("past_")} == {"past_k_{l}", "past_v_{l}"}


def test_cost_parts_and_cache_are_those_of_the_program() -> None:
    program = pruned("cut-visual{from_layer=1}")
    data = taken("cut-visual{from_layer=1}").data
    cost = cost_of(program, **SIZES)
    assert data["cost"]["prefill"]["flops"] == cost.prefill.flops
    assert data["cost"]["prefill"]["time_s"] == pytest.approx(cost.prefill.time_s, rel=1e-5)
    assert data["cost"]["kv_bytes"] == cost.kv_bytes
    for name, parts in breakdown(program, by=("layer", "stream"), **SIZES).items():
        rows = data["parts"][name]
        whole = sum((row["layers"][1] - row["layers"][0] + 1) * row["flops"] for row in rows)
        assert whole == sum(part.work.flops for part in parts)
    assert [(row["layers"], row["visual"]) for row in data["kv"]] == [
        ([0, 0], "float32[batch, 2, visual_tokens, 8]"),
        ([1, 2], None),
    ]
    assert data["sizes"]["text_tokens"] == 7 and data["sizes"]["visual_tokens"] == 16
    assert data["sizes"]["device"] == "cpu"


def test_passes_are_told_with_their_notes() -> None:
    program = fresh("fastv{layer=1,keep=0.5}")
    program.passes.append(PassRecord("odd\x1b[2Jpass\nname", notes=("a\nb",), skipped="no\treason"))
    snap = snapshot(program, **SIZES)
    told = snap.data["passes"]
    assert [record["skipped"] for record in told] == [None, "no reason"]
    assert told[1]["text"] == "odd [2Jpass name" and told[1]["notes"] == ["a b"]
    assert snap.passes == ["fastv{layer=1}"]
    assert read_snapshot(snap.to_text()) == snap


@pytest.mark.parametrize("wrong", [{"name": "two\nlines"}, {"text_tokens": 0}, {"device": "abacus"}, {"dtype": "f3"}])
def test_wrong_arguments(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        snapshot(traced()[1], **wrong)


def test_a_short_name_that_is_taken_stays_long() -> None:
    program = fresh()
    graph = program.prefill
    edit = Rewriter(program, graph, "test")
    last = next(n for n in graph.nodes if n.name == "l1_visual_add_6")
    with edit.after(last):
        edit.call(torch.ops.aten.neg.default, last, about=NodeInfo(1, "residual", "visual"), name="l1_visual")
    names = [n[0] for n in sections(snapshot(program, **SIZES))[1, 1]]
    assert "l1_visual" in names and "visual" not in names


@pytest.mark.slow
def test_another_process_writes_the_same_bytes() -> None:
    pipeline = "fastv{layer=1,keep=0.5},drop-visual-heads{keep=2,from_layer=1}"
    code = (
        "import sys; from tests.ir.programs import pruned; from foveate.ir.snapshot.make import snapshot;"
        f"sys.stdout.write(snapshot(pruned({pipeline!r}), name='x').to_text())"
    )
    root = Path(__file__).parents[2]
    seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": seed},
        cwd=root,
        capture_output=True,
        check=True,
    )
    assert done.stdout.decode() == snapshot(pruned(pipeline), name="x").to_text()
    assert b"0x" not in done.stdout and str(root).encode() not in done.stdout


@pytest.mark.parametrize(
    ("path", "layer", "text"),
    [
        ("model.layers.3.mlp.weight", 3, "model.layers.{l}.mlp.weight"),
        ("model.layers.3.block.3.weight", 3, "model.layers.{l}.block.3.weight"),
        ("model.layers.13.mlp.weight", 3, "model.layers.13.mlp.weight"),
        ("model.layers.4.mlp.3.weight", 3, "model.layers.4.mlp.3.weight"),
        ("lm_head.weight", 3, "lm_head.weight"),
    ],
)
def test_weight_paths(path: str, layer: int, text: str) -> None:
    assert weight_path(path, layer) == text


# Files that anyone may have written.


def test_a_file_cut_short_is_refused() -> None:
    text = taken().to_text()
    for part in range(20):
        with pytest.raises(ArtifactError):
            read_snapshot(text[: len(text) * part // 20])


def edit(change: Callable[[dict[str, Any]], Any]) -> str:
    data = copy.deepcopy(taken().data)
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.pop("graphs"), "graphs must be there"),
        (lambda d: d["cost"].pop("kv_bytes"), "cost.kv_bytes must be there"),
        (lambda d: d["cost"].update(kv_bytes="many"), "cost.kv_bytes must be a number"),
        (lambda d: d["cost"]["vision"].update(flops=-1), "cost.vision.flops must be a number, 0 or more"),
        (lambda d: d["model"].update(layers=True), "model.layers must be a whole number"),
        (lambda d: d["model"].update(grid=[1]), "model.grid must be a list of 2 to 2"),
        (lambda d: d["model"].update(name="a\x1b[31m"), "model.name must be one line of printable text"),
        (lambda d: d["model"].update(name="\ud800"), "model.name must be one line"),
        (lambda d: d["model"].update(name="\u202egpj.exe"), "model.name must be one line"),
        (lambda d: d.update(passes={}), "passes must be a list"),
        (lambda d: d.update(foveate_snapshot=2), "made by a newer foveate"),
        (lambda d: d.update(foveate_snapshot=0), "foveate_snapshot must be 1"),
        (lambda d: d.update(foveate_snapshot=True), "foveate_snapshot must be 1"),
        (lambda d: d.update(foveate_snapshot=None), "foveate_snapshot must be 1"),
        (lambda d: d.pop("foveate_snapshot"), "it has no key foveate_snapshot"),
        (lambda d: d["graphs"]["prefill"]["inputs"].append("x"), "must be a list of name, call"),
        (lambda d: d["graphs"]["prefill"]["inputs"][0].pop(), "inputs[0] must be a list of name, call"),
        (lambda d: d["graphs"]["prefill"]["inputs"][0].__setitem__(0, "a b"), "inputs[0].name must be a name"),
        (lambda d: d["graphs"]["prefill"]["inputs"][0].__setitem__(1, "x"), "inputs[0].call must be a call"),
        (lambda d: d["graphs"]["prefill"]["inputs"][0].__setitem__(2, "sound"), "inputs[0].stream must be one of"),
        (lambda d: d["graphs"]["prefill"]["inputs"].append(d["graphs"]["prefill"]["inputs"][0]), "different names"),
        (lambda d: d["graphs"].update({"<b>": d["graphs"]["vision"]}), "the name of a graph"),
        (lambda d: d["graphs"]["prefill"]["sections"][1].update(layers=[0, 10**9]), "first and the last layer"),
        (lambda d: d["graphs"]["prefill"]["sections"][1].update(layers=[3, 1]), "first and the last layer"),
        (lambda d: d["graphs"]["prefill"]["sections"][1].update(layers=[-1, 0]), "behind the layers of the entry"),
        (lambda d: d["graphs"]["prefill"]["sections"][-1].update(layers=[3, 4095]), None),
        (lambda d: d["graphs"]["prefill"]["returns"].update(logits=7), "returns.logits must be the name of a value"),
        (lambda d: d["graphs"]["prefill"]["returns"].update(kv=7), "returns.kv must be a list"),
        (lambda d: d["graphs"]["prefill"].update(returns=[]), "returns must be an object"),
        (lambda d: d["parts"]["prefill"][0].update(flops=1e999), "which is no number"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(change: Callable[[dict[str, Any]], Any], said: str | None) -> None:
    text = edit(change)
    if said is None:
        assert read_snapshot(text)
        return
    with pytest.raises(ArtifactError) as caught:
        read_snapshot(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_layers_that_would_unfold_to_millions_of_nodes_are_refused() -> None:
    def many(data: dict[str, Any]) -> None:
        graph = data["graphs"]["prefill"]
        lines = [[f"x_{n}", "aten.neg.default(text)", "text", "mlp", "split", "int64[1]"] for n in range(1000)]
        graph["sections"] = [{"layers": [0, 4000], "nodes": lines}]

    with pytest.raises(ArtifactError, match="at most 200000 nodes"):
        read_snapshot(edit(many))


def test_keys_of_a_later_foveate_are_left_out() -> None:
    assert read_snapshot(edit(lambda d: d.update(colour="red"))) == taken()


@pytest.mark.parametrize(
    "text",
    ["{", "{}", '{"foveate_snapshot": 1}', "[" * 100_000, '{"a":' * 100_000, '{"foveate_snapshot": NaN}',
     "{" + "9" * 5000, '{"foveate_snapshot": ' + "9" * 5000 + "}", '{"foveate_snapshot": 1e400}'],
)  # fmt: skip
def test_what_is_no_snapshot(text: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=r"x\.json"):
        read_snapshot(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe{}")
    (tmp_path / "large.json").write_bytes(b" " * (MAX_BYTES + 1))
    for name, said in (("missing.json", "is no file"), ("bytes.json", "no text"), ("large.json", "larger than")):
        with pytest.raises(ArtifactError, match=said):
            read_snapshot(tmp_path / name)
    with pytest.raises(ArtifactError, match="is no file"):
        read_snapshot(tmp_path)
    with pytest.raises(ArtifactError):
        read_snapshot("a\0b")


def test_a_path_may_be_text(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(taken().to_text())
    assert read_snapshot(str(path)) == read_snapshot(path) == taken()


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), lambda x: st.lists(x, max_size=3))


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_damaged_snapshot_is_read_or_refused_and_nothing_else(data: st.DataObject) -> None:
    content = copy.deepcopy(taken().data)
    place: Any = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys), "key")
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans(), "deeper"):
            place = place[key]
            continue
        place[key] = data.draw(JSON, "value")
        break
    try:
        read = read_snapshot(json.dumps(content))
    except ArtifactError as error:
        assert str(error).startswith("snapshot")
    else:
        assert read_snapshot(read.to_text()) == read


def test_more_equal_layers_cost_nothing() -> None:
    small, large = (len(taken(layers=layers).to_text()) for layers in (6, 8))
    assert small < 120_000
    assert abs(large - small) < 200
