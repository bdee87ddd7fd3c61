"""Layers that do the same are one function, and calling them in turn is running the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from foveate.backends.adapters import with_adapters
from foveate.backends.base import input_names
from foveate.backends.regions import Region, regions, run_by_regions
from foveate.ir.join import join
from foveate.ir.program import Program
from foveate.models.random import random_llava
from foveate.models.registry import trace_program
from foveate.passes.pipeline import apply_pipeline
from tests.ir.programs import PIPELINES, pruned

TOKENS = {"batch": 2, "visual_tokens": 16, "text_tokens": 7, "past_tokens": 5, "images": 2}


def value_for(node: fx.Node, program: Program, generator: torch.Generator) -> Any:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return 3
    names = program.symbols.names()
    shape = [
        int(s.node.expr.subs({k: TOKENS.get(v, 4) for k, v in names.items()})) if isinstance(s, torch.SymInt) else s
        for s in value.shape
    ]
    if value.is_floating_point():
        return torch.randn(shape, generator=generator, dtype=value.dtype)
    return torch.arange(shape[-1]).expand(shape).contiguous()


@pytest.mark.parametrize("alike", [1, 2])
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("name", ["vision", "prefill", "decode"])
def test_regions_in_turn_are_the_graph(pipeline: str, name: str, alike: int) -> None:
    program = pruned(pipeline)
    graph = join(program, program.prefill) if name == "prefill" else program.graphs[name]
    generator = torch.Generator().manual_seed(0)
    inputs = {str(n.target): value_for(n, program, generator) for n in graph.nodes if n.op == "placeholder"}
    made: list[Region] = []

    def make(region: Region) -> Any:
        made.append(region)
        return fx.GraphModule(torch.nn.Module(), region.graph)

    with torch.no_grad():
        op_by_op = fx.GraphModule(*with_adapters(program, graph))
        whole = op_by_op(*(inputs[name] for name in input_names(graph)))
        parts = run_by_regions(program, graph, make, alike)(inputs)
    flat_whole, flat_parts = (torch.utils._pytree.tree_flatten(x) for x in (whole, parts))
    assert flat_whole[1] == flat_parts[1]
    for a, b in zip(flat_whole[0], flat_parts[0], strict=True):
        assert a is b is None or torch.equal(a, b)
    assert len(made) == len({region.key for region in regions(graph, alike)})


@pytest.mark.parametrize("pipeline", ["", "drop-visual-heads{keep=2},drop-visual-neurons,cut-visual{from_layer=0.5}"])
@pytest.mark.slow
def test_a_deeper_model_has_no_more_functions(pipeline: str) -> None:
    counts = []
    for layers in (12, 24):
        model = random_llava(layers=layers, hidden=32, heads=4, ffn=64, device="meta")
        program = apply_pipeline(trace_program(model), pipeline)
        found = regions(join(program, program.prefill))
        assert len(found) == layers + 2
        counts.append(len({region.key for region in found}))
    assert counts[0] == counts[1] <= 10


def test_layers_with_few_equals_are_joined_with_their_neighbours() -> None:
    graph = join(pruned("", layers=8), pruned("", layers=8).prefill)
    alone, joined = regions(graph), regions(graph, alike=4)
    keys = [region.key for region in alone]
    repeated = [key for key in keys if keys.count(key) >= 4]
    assert len(repeated) >= 4
    assert [region.key for region in joined if region.key in repeated] == repeated
    assert len(joined) == len(repeated) + 2  # what is in front of them, and behind
    assert len(regions(graph, alike=len(keys))) == 1
