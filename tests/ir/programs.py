"""Small programs for tests: traced once a process, copied for every test that edits one."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from transformers import LlavaForConditionalGeneration

from foveate.ir.decode import derive_decode
from foveate.ir.program import Program, Weights
from foveate.ir.split import split
from foveate.ir.statistics import Statistics
from foveate.ir.tail import keep_last
from foveate.model import OptimizedModel
from foveate.models.random import random_llava
from foveate.models.registry import trace_joint, trace_program
from foveate.passes.pipeline import apply_pipeline

LAYERS, HEADS, KV_HEADS, FFN, TOKENS = 3, 4, 2, 48, 16

PIPELINES = (
    "",
    "cut-visual{from_layer=1}",
    "cut-visual{from_layer=0}",
    "drop-visual-heads{keep=2,from_layer=0}",
    "drop-visual-heads{keep=0,from_layer=1}",
    "drop-visual-heads{keep=2,from_layer=0,renorm=false}",
    "drop-visual-neurons{keep=0.5}",
    "fastv{layer=1,keep=0.5}",
    "random-prune{layer=1,keep=0.29,seed=3}",
    "fastv{layer=1,keep=0.5},fastv{layer=2,keep=0.5}",
    "neighbor-attention{radius=1},fastv{layer=1,keep=0.5}",
    "divprune{keep=0.7},pyramiddrop{layers=[1,2],keep=0.6}",
    "vispruner{keep=0.6},fastervlm{keep=0.8},grid-prune{layer=1,keep=0.5}",
    "visionzip{dominant=5,contextual=3},neighbor-attention{radius=1}",
    "prumerge{keep=0.5,plus=true}",
    "resize{grid=3}",
    "average-pool",
    "tome{merge=4},divprune{keep=0.6}",
    "crossget{merge=5}",
    "sparsevlm{layers=[0,1],keeps=[0.3,0.1]}",
    "sparsevlm{layers=[0,1],counts=rank,scale=0.5}",
    "neighbor-attention{radius=1,layers=[1]},fitprune{schedule=[3,5,0]}",
    "cdpruner{keep=0.5,clip=none}",
    "dart{layer=1,keep=0.5}",
    "drop-visual-heads{keep=2,from_layer=1},drop-visual-neurons{keep=0.5},fastv{layer=1,keep=0.5},"
    "cut-visual{from_layer=2}",
)
"""Pipelines that together use every pass, alone and one after another."""


def llava(**sizes: Any) -> LlavaForConditionalGeneration:
    """A model that no other test holds."""
    defaults: dict[str, Any] = {"layers": LAYERS, "hidden": 32, "heads": HEADS, "ffn": FFN}
    vision = {"visual_tokens": TOKENS, "kv_heads": KV_HEADS, "vision_layers": 2, "vision_hidden": 16, "vocab": 64}
    return random_llava(**{**defaults, **vision, **sizes})


def once(make: Callable[..., Any]) -> Callable[..., Any]:
    """Remember results, whichever way the arguments are given."""
    signature = inspect.signature(make)
    results: dict[tuple[Any, ...], Any] = {}

    @functools.wraps(make)
    def remembered(*args: Any, **options: Any) -> Any:
        bound = signature.bind(*args, **options)
        bound.apply_defaults()
        if bound.args not in results:
            results[bound.args] = make(*bound.args)
        return results[bound.args]

    return remembered


@once
def model(kv_heads: int = KV_HEADS, layers: int = LAYERS) -> LlavaForConditionalGeneration:
    """The model behind the programs of this module; nobody may change it."""
    return llava(kv_heads=kv_heads, layers=layers)


@once
def traced(kv_heads: int = KV_HEADS, layers: int = LAYERS) -> tuple[fx.Graph, Program]:
    """The joint decoder and the dense program; nobody may edit them."""
    joint, program = trace_joint(model(kv_heads, layers))
    program.graphs["prefill"] = keep_last(program, split(program, joint))
    program.graphs["decode"] = derive_decode(program)
    return joint, program


@once
def weightless() -> tuple[LlavaForConditionalGeneration, Program]:
    """The same model on the meta device, and its program; nobody may edit it."""
    source = llava(device="meta")
    return source, trace_program(source)


@once
def pruned(pipeline: str, kv_heads: int = KV_HEADS, layers: int = LAYERS) -> Program:
    """The program after a pipeline; nobody may edit it."""
    return apply_pipeline(fresh(kv_heads=kv_heads, layers=layers), pipeline)


@once
def optimized(pipeline: str, kv_heads: int = KV_HEADS, layers: int = LAYERS) -> OptimizedModel:
    """The same as a model that runs."""
    source = model(kv_heads, layers)
    return OptimizedModel(pruned(pipeline, kv_heads, layers), source.config, source.generation_config)


def fresh(pipeline: str = "", kv_heads: int = KV_HEADS, layers: int = LAYERS) -> Program:
    """A program that the caller may edit."""
    return copied(pruned(pipeline, kv_heads, layers) if pipeline else traced(kv_heads, layers)[1])


def copied(program: Program) -> Program:
    """The same graphs over the same tensors, to be edited apart."""
    weights = Weights()
    for name, value in program.weights.items():
        weights.put(name, value)
    graphs = {name: copied_graph(graph) for name, graph in program.graphs.items()}
    return Program(program.info, weights, program.symbols, graphs, list(program.passes))


def copied_graph(graph: fx.Graph) -> fx.Graph:
    """A graph with the same node names and metadata."""
    copy = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), nodes.__getitem__)
        nodes[node] = copy.create_node(node.op, node.target, args, kwargs, name=node.name)
        nodes[node].meta.update(node.meta)
    return copy


def made_up_statistics() -> Statistics:
    """Of four samples that nobody saw; no two visual tokens are one apart."""
    empty = Statistics.empty(traced()[1].info, {"model": "made up"})
    draw = torch.Generator().manual_seed(0)
    far = len(empty.pairs)
    pairs = torch.arange(far, 0, -1, dtype=torch.float64)
    pairs[1] = 0
    return replace(
        empty,
        mass=torch.rand(4, LAYERS, HEADS, generator=draw),
        output=torch.rand(4, LAYERS, HEADS, generator=draw),
        text_to_visual=4 * torch.rand(LAYERS, HEADS, generator=draw, dtype=torch.float64),
        by_distance=pairs * torch.rand(LAYERS, HEADS, far, generator=draw, dtype=torch.float64),
        pairs=pairs,
    )
