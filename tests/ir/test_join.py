"""Joining is the way back from splitting, and costs no second reading of a weight."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import foveate.kernels  # noqa: F401  registers what the ops compute
from foveate import ops
from foveate.ir.join import join
from foveate.ir.program import Program, outputs
from foveate.ir.rewriter import nodes_of
from foveate.ir.split import split, structure
from foveate.ir.weights import weight_name, weight_part
from foveate.ops import PAD
from tests.ir.programs import HEADS, LAYERS, PIPELINES, fresh, pruned, traced

aten = torch.ops.aten
pipelines = pytest.mark.parametrize("pipeline", PIPELINES)


def prompt(visual: int, text: int, prefix: int, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """Inputs of a split prefill graph; a negative prefix gives ragged rows instead of a promise."""
    generator = torch.Generator().manual_seed(seed)
    start = max(prefix, 2)
    places = torch.arange(visual + text)
    orders = {"visual": places[start : start + visual], "text": torch.cat([places[:start], places[start + visual :]])}
    number = torch.arange(visual)
    coords = torch.stack([number // 16, number % 16 // 4, number % 4], 1).expand(batch, -1, -1)
    inputs: dict[str, Any] = {"prefix": prefix, "visual_coords": coords, "grids": torch.empty(0, 6, dtype=torch.int64)}
    for name, order in orders.items():
        rows = order.repeat(batch, 1)
        inputs[name] = torch.randn(batch, rows.shape[1], 32, generator=generator)
        inputs[f"{name}_position_ids"] = rows.clone()
        if prefix < 0:
            hide = slice(rows.shape[1] - 2, None) if name == "visual" else slice(0, 2)
            rows = rows.clone()
            rows[0, hide] = PAD
        inputs[f"{name}_order"] = rows
    return inputs


def run(program: Program, graph: fx.Graph, inputs: dict[str, Any]) -> dict[str, Any]:
    names = [str(n.target) for n in graph.nodes if n.op == "placeholder"]
    with torch.no_grad():
        result: dict[str, Any] = fx.GraphModule(program.weights, graph)(*(inputs[n] for n in names))
    return result


def flat(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [x for key in sorted(value) for x in flat(value[key])]
    return [x for v in value for x in flat(v)] if isinstance(value, (list, tuple)) else [value]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_join_of_split_is_the_graph_it_came_from(kv_heads: int) -> None:
    joint, program = traced(kv_heads)
    before = structure(joint)
    back = join(program, split(program, joint), inputs=True)
    assert structure(back) == before
    assert structure(joint) == before, "splitting does not change the joint graph"


def test_structure_tells_graphs_apart() -> None:
    """The comparison above would be worth nothing if it saw no difference."""
    program = fresh()
    before = structure(program.prefill)
    node = nodes_of(program.prefill, op=aten.linear.default)[0]
    node.args = (node.args[0], nodes_of(program.prefill, op=aten.linear.default)[-1].args[1])
    assert structure(program.prefill) != before


@pipelines
def test_joining_does_not_change_the_split_graph(pipeline: str) -> None:
    program = fresh(pipeline)
    before = program.to_text()
    join(program, program.prefill)
    assert program.to_text() == before


@pipelines
@pytest.mark.parametrize("prefix", [3, -1])
def test_joined_and_split_graphs_give_the_same(pipeline: str, prefix: int) -> None:
    program = pruned(pipeline)
    for visual, text in ((16, 9), (0, 12), (32, 40)):
        inputs = prompt(visual, text, prefix)
        split_, joined = (run(program, g, inputs) for g in (program.prefill, join(program, program.prefill)))
        mine, theirs = flat(joined), flat(split_)
        assert len(mine) == len(theirs) > 2 * LAYERS
        for a, b in zip(mine, theirs, strict=True):
            if isinstance(b, Tensor):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            else:
                assert a is b is None


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_joined_prefill_with_grouped_heads_gives_the_same(kv_heads: int) -> None:
    pipeline = "drop-visual-heads{keep=2,from_layer=0},fastv{layer=2,keep=0.5}"
    program = pruned(pipeline, kv_heads)
    inputs = prompt(16, 9, 3)
    for a, b in zip(
        flat(run(program, program.prefill, inputs)),
        flat(run(program, join(program, program.prefill), inputs)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def linears(graph: fx.Graph) -> Counter[str]:
    return Counter(weight_name(n) for n in nodes_of(graph, op=aten.linear.default))


@pytest.mark.parametrize("pipeline", ["", "fastv{layer=1,keep=0.5}", "random-prune{layer=1,keep=0.29,seed=3}"])
def test_a_joined_program_reads_each_weight_once(pipeline: str) -> None:
    program = pruned(pipeline)
    assert max(linears(program.prefill).values()) == 2
    joined = linears(join(program, program.prefill))
    assert set(joined.values()) == {1}
    assert set(joined) == set(linears(program.prefill))


def element_reads(graph: fx.Graph) -> dict[str, Tensor]:
    """Weight of a linear -> how many linears read each of its elements."""
    reads: dict[str, Tensor] = {}
    for node in nodes_of(graph, op=aten.linear.default):
        weight, part = weight_part(node)
        counts = reads.setdefault(str(weight.target), torch.zeros(tuple(weight.meta["val"].shape)))
        counts[tuple(slice(start, stop) for start, stop in part)] += 1
    return reads


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("neurons", ["prefix", "random"])
def test_what_visual_tokens_use_of_a_weight_is_read_once_for_all_tokens(kv_heads: int, neurons: str) -> None:
    heads = [[h != 1 for h in range(HEADS)]] * LAYERS if kv_heads == 2 else [[True, False, True, False]] * LAYERS
    pipeline = f"drop-visual-heads{{mask={heads},from_layer=0}},drop-visual-neurons{{keep=0.3,select={neurons}}}"
    program = pruned(pipeline.replace("True", "true").replace("False", "false"), kv_heads)
    apart, together = element_reads(program.prefill), element_reads(join(program, program.prefill))
    assert max(int(count.max()) for count in apart.values()) == 2
    assert apart.keys() == together.keys()
    assert all(bool((count == 1).all()) for count in together.values())


def test_kept_heads_of_both_streams_are_one_causal_call() -> None:
    program = pruned("drop-visual-heads{keep=2,from_layer=0}", 4)
    layouts = [n.args[6] for n in join(program, program.prefill).nodes if n.target == ops.attention]
    assert layouts == ["vt:vt", "t:t"] * (LAYERS - 1) + ["t:vt", "t:t"]


def test_hidden_states_that_both_streams_share_are_never_copied() -> None:
    program = pruned("drop-visual-heads{keep=2,from_layer=0},drop-visual-neurons{keep=0.5}", 4)
    joined = join(program, program.prefill)
    sums = [n for n in joined.nodes if n.target == ops.residual]
    assert len(sums) == 2 * (LAYERS - 1), "one behind attention and one behind the FFN"
    hidden = [n.name for n in nodes_of(joined, op=aten.cat.default, stream="joint") if n.meta["val"].shape[-1] == 32]
    behind = [n for n in hidden if not n.startswith("pre_")]
    assert len(behind) <= 1, "the last layer runs for visual keys and one text token"


def test_a_dense_layer_is_one_causal_call() -> None:
    _, program = traced()
    joined = join(program, program.prefill)
    layouts = [n.args[6] for n in joined.nodes if n.target == ops.attention]
    assert layouts == ["vt:vt"] * (LAYERS - 1) + ["t:vt"]


@pipelines
def test_a_joined_graph_is_well_formed_and_keeps_its_interface(pipeline: str) -> None:
    program = pruned(pipeline)
    joined = join(program, program.prefill)
    joined.lint()
    names = [[n.name for n in g.nodes if n.op == "placeholder"] for g in (program.prefill, joined)]
    assert names[0] == names[1]
    assert set(outputs(joined)) == set(outputs(program.prefill)) == {"logits", "kv", "kept"}
    assert all(n.users for n in joined.nodes if n.op in ("call_function", "get_attr"))
