"""Every edit goes through the rewriter, which keeps shapes, reasons and an honest flag."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from foveate.ir.join import join
from foveate.ir.program import NodeInfo, Program, info
from foveate.ir.rewriter import Rewriter, equal_nodes, nodes_of
from foveate.ir.split import structure
from foveate.passes.base import Pass
from foveate.passes.pipeline import parse_pipeline
from tests.ir.programs import LAYERS, PIPELINES, fresh, pruned

aten = torch.ops.aten
pipelines = pytest.mark.parametrize("pipeline", PIPELINES)


def passes_of(pipeline: str) -> list[tuple[str, Pass]]:
    """Each pass of a pipeline with the pipeline before it."""
    found = parse_pipeline(pipeline)
    return [(",".join(p.text() for p in found[:i]), found[i]) for i in range(len(found))]


STEPS = [step for pipeline in PIPELINES for step in passes_of(pipeline)]
steps = pytest.mark.parametrize(("before", "step"), STEPS, ids=lambda x: x.text() if isinstance(x, Pass) else x)


@pipelines
@pytest.mark.parametrize("graph", ["vision", "prefill", "decode", "joined"])
def test_every_node_says_who_made_it_and_from_what(pipeline: str, graph: str) -> None:
    program = pruned(pipeline)
    known = {"trace", "split", "keep-last", "decode", "join", "share", *(p.name for _, p in passes_of(pipeline))}
    chosen = join(program, program.prefill) if graph == "joined" else program.graphs[graph]
    for node in chosen.nodes:
        about = node.meta["foveate"]
        assert isinstance(about, NodeInfo)
        if node.op == "output":
            continue
        assert about.by in known, node.name
        assert about.stream in ("visual", "text", "joint", "none")
        assert -1 <= about.layer <= LAYERS
        assert about.role, node.name
        assert "val" in node.meta


@steps
def test_the_changed_flag_agrees_with_the_structure(before: str, step: Pass) -> None:
    program = fresh(before)
    graph = program.graphs[step.graph]
    hashed = structure(graph)
    edit = Rewriter(program, graph, by=step.name)
    list(step.rewrite(edit))
    assert edit.changed
    assert structure(graph) != hashed


@steps
def test_a_pass_that_was_refused_or_skipped_changed_nothing(before: str, step: Pass) -> None:
    """Applying a pass a second time may fail, be skipped or go further, but it must not lie."""
    program = fresh(before)
    graph = program.graphs[step.graph]
    step.apply(program)
    hashed = structure(graph)
    edit = Rewriter(program, graph, by=step.name)
    try:
        list(step.rewrite(edit))
    except Exception:
        assert not edit.changed
        assert structure(graph) == hashed
    else:
        assert edit.changed == (structure(graph) != hashed)


@steps
def test_what_a_pass_made_names_the_pass(before: str, step: Pass) -> None:
    program = fresh(before)
    graph = program.graphs[step.graph]
    old = {n.name for n in graph.nodes}
    step.apply(program)
    made = [n for n in graph.nodes if n.name not in old and n.op == "call_function"]
    assert {info(n).by for n in made} <= {step.name}


@pipelines
def test_shapes_are_those_that_a_fresh_evaluation_gives(pipeline: str) -> None:
    program = fresh(pipeline)
    for graph in program.graphs.values():
        before = {n.name: str(n.meta["val"]) for n in graph.nodes if n.op == "call_function"}
        Rewriter(program, graph, by="test").refresh()
        assert {n.name: str(n.meta["val"]) for n in graph.nodes if n.op == "call_function"} == before


def small() -> tuple[Program, Rewriter, fx.Node]:
    program = fresh()
    edit = Rewriter(program, fx.Graph(), by="test")
    value = program.symbols.tensor("batch", "text_tokens", 8, dtype=torch.float32, device=torch.device("cpu"))
    return program, edit, edit.placeholder("x", value, NodeInfo(-1, "x", "text"))


ABOUT = NodeInfo(0, "somewhere", "text")


def test_a_new_rewriter_has_changed_nothing() -> None:
    assert not Rewriter(fresh(), fx.Graph(), by="test").changed


def test_merge_equal_computes_once_and_tells_other_constants_apart() -> None:
    _, edit, x = small()
    a = edit.call(aten.mul.Tensor, x, 2.0, about=ABOUT)
    b = edit.call(aten.mul.Tensor, x, 2.0, about=ABOUT)
    c = edit.call(aten.mul.Tensor, x, 2.5, about=ABOUT)
    d = edit.call(aten.sum.dim_IntList, edit.call(aten.add.Tensor, a, b, about=ABOUT), [2], True, about=ABOUT)
    e = edit.call(aten.sum.dim_IntList, edit.call(aten.add.Tensor, b, a, about=ABOUT), [2], False, about=ABOUT)
    edit.output({"out": [c, d, e]})
    same = equal_nodes(edit.graph)
    assert same[b] is a and same[c] is c and same[d] is d and same[e] is e
    edit.merge_equal()
    assert len(nodes_of(edit.graph, op=aten.mul.Tensor)) == 2
    assert not any(n is b for n in edit.graph.nodes)


def test_sweep_erases_the_dead_and_keeps_inputs() -> None:
    _, edit, x = small()
    kept = edit.call(aten.neg.default, x, about=ABOUT)
    edit.call(aten.cos.default, edit.call(aten.sin.default, x, about=ABOUT), about=ABOUT)
    unused = edit.placeholder("unused", x.meta["val"], ABOUT)
    edit.output({"out": kept})
    assert edit.sweep() == 2
    assert edit.sweep() == 0
    assert unused in list(edit.graph.nodes)


def test_names_come_from_place_and_op_alone() -> None:
    names = []
    for _ in range(2):
        _, edit, x = small()
        names.append([edit.call(aten.neg.default, x, about=ABOUT).name for _ in range(3)])
    assert names[0] == names[1] == ["l0_text_neg_1", "l0_text_neg_2", "l0_text_neg_3"]


def test_a_weight_has_one_node_in_front_of_everything_that_computes() -> None:
    program, edit, x = small()
    name = next(iter(program.weights.names))
    first = edit.weight(name)
    edit.call(aten.neg.default, x, about=ABOUT)
    other = edit.weight("lm_head.weight")
    assert edit.weight(name) is first
    order = [n.op for n in edit.graph.nodes]
    assert order == ["placeholder", "get_attr", "get_attr", "call_function"]
    assert other.target == "lm_head.weight"


def test_replace_where_leaves_the_other_users() -> None:
    _, edit, x = small()
    a = edit.call(aten.neg.default, x, about=ABOUT)
    b = edit.call(aten.sin.default, x, about=ABOUT)
    new = edit.call(aten.cos.default, x, about=ABOUT)
    edit.replace(x, new, where=lambda user: user is b)
    assert a.args == (x,) and b.args == (new,) and new.args == (x,)
