"""Costs against what running the graphs really does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

import foveate.kernels  # noqa: F401  registers what the ops compute
from foveate import ops
from foveate.errors import InputError
from foveate.ir.cost import Cost, Device, cost_of
from foveate.ir.join import join
from foveate.ir.program import Program
from foveate.model import OptimizedModel
from foveate.models.random import random_inputs
from foveate.models.registry import trace_program
from foveate.passes.pipeline import apply_pipeline
from tests.ir.programs import (
    HEADS,
    LAYERS,
    PIPELINES,
    TOKENS,
    copied,
    llava,
    model,
    optimized,
    pruned,
    traced,
    weightless,
)

pipelines = pytest.mark.parametrize("pipeline", PIPELINES)


def attention_flops(q: Any, k: Any, *rest: Any, **options: Any) -> int:
    batch, heads, _, size = q[0].shape
    return 4 * batch * heads * size * sum(x.shape[2] for x in q) * sum(x.shape[2] for x in k)


def encoder_flops(q: Tensor, k: Tensor, *rest: Any, **options: Any) -> int:
    return 4 * q.numel() * k.shape[2]


def row_flops(q: Tensor, k: Any, *rest: Any, **options: Any) -> int:
    return 2 * q.numel() * sum(x.shape[2] for x in k)


for _function in (attention_flops, encoder_flops, row_flops):
    _function._get_raw = True  # type: ignore[attr-defined]  # tensors, not shapes

COUNTED = {
    torch.ops.foveate.attention: attention_flops,
    torch.ops.foveate.encoder_attention: encoder_flops,
    torch.ops.foveate.attention_row: row_flops,
}


def counted(program: Program, graph: fx.Graph, sizes: dict[str, int]) -> int:
    """FLOPs that torch counts while a graph runs on zeros of these sizes."""
    symbols = {size.node.expr: sizes[name] for name, size in program.symbols.sizes.items() if name in sizes}
    inputs: list[Any] = []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            inputs.append(-1)
            continue
        shape = [s if isinstance(s, int) else int(s.node.expr.subs(symbols)) for s in value.shape]
        inputs.append(torch.zeros(shape, dtype=value.dtype))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        fx.GraphModule(program.weights, graph)(*inputs)
    return counter.get_total_flops()


@pipelines
def test_flops_are_those_that_torch_counts(pipeline: str) -> None:
    program = pruned(pipeline)
    cost = cost_of(program, visual_tokens=32, text_tokens=11, batch=3, images=2, past_tokens=7)
    sizes = {"batch": 3, "images": 6, "visual_tokens": 32, "text_tokens": 11}
    assert cost.vision.flops == counted(program, program.graphs["vision"], sizes)
    joined = join(program, program.prefill)
    assert cost.prefill.flops == counted(program, joined, sizes) == counted(program, program.prefill, sizes)
    step = {**sizes, "text_tokens": 1, "past_tokens": 7}
    assert cost.decode.flops == counted(program, program.graphs["decode"], step)


def test_a_dense_prefill_costs_what_the_formula_says() -> None:
    cost = cost_of(traced(HEADS)[1], visual_tokens=TOKENS, text_tokens=10)
    tokens, last = TOKENS + 10, 1
    projections, ffn = 2 * 32 * 32, 3 * 2 * 32 * 48
    layer = tokens * (4 * projections + ffn) + 4 * 32 * tokens * tokens
    final = tokens * 2 * projections + last * (2 * projections + ffn) + 4 * 32 * last * tokens
    assert cost.prefill.flops == (LAYERS - 1) * layer + final + 2 * 32 * 64


@pipelines
@pytest.mark.parametrize("batch", [1, 2])
def test_kv_bytes_are_those_of_a_real_cache(pipeline: str, batch: int) -> None:
    opt = optimized(pipeline)
    inputs = random_inputs(model(), batch=batch, images=2, text_tokens=9)
    cache = opt(**inputs).past_key_values
    assert cache.nbytes() == cost_of(opt.program, text_tokens=9, images=2, batch=batch).kv_bytes


@pytest.fixture(scope="module")
def hundred() -> tuple[Any, Program]:
    """A model whose image is a hundred tokens."""
    source = llava(layers=2, visual_tokens=100)
    return source, trace_program(source)


@pytest.mark.parametrize("keep", [0.29, 0.57, 0.58, 0.07])
def test_kv_bytes_round_as_the_kernels_do(keep: float, hundred: tuple[Any, Program]) -> None:
    """0.29 * 100 is a little below 29 in floating point."""
    source, dense = hundred
    program = apply_pipeline(copied(dense), f"random-prune{{layer=1,keep={keep}}}")
    opt = OptimizedModel(program, source.config, source.generation_config)
    cache = opt(**random_inputs(source)).past_key_values
    assert cache.nbytes() == cost_of(program, text_tokens=12).kv_bytes


@pytest.mark.parametrize("pipeline", ["", "cut-visual{from_layer=1}", "fastv{layer=1,keep=0.5}"])
def test_costs_need_no_weights(pipeline: str) -> None:
    far = apply_pipeline(copied(weightless()[1]), pipeline)
    assert cost_of(far, images=3) == cost_of(pruned(pipeline), images=3)


def test_a_forecast_without_weights_never_promises_more_than_the_weights_hold() -> None:
    """Which heads go is known from the weights only; several may share a key head."""
    pipeline = "drop-visual-heads{keep=2,from_layer=0}"
    far = cost_of(apply_pipeline(copied(weightless()[1]), pipeline), images=3)
    near = cost_of(pruned(pipeline), images=3)
    assert far.prefill.flops >= near.prefill.flops
    assert far.kv_bytes >= near.kv_bytes


def figures(cost: Cost) -> dict[str, float]:
    flat = {"kv_bytes": cost.kv_bytes, "peak_bytes": cost.peak_bytes}
    for name in ("vision", "prefill", "decode"):
        graph = getattr(cost, name)
        flat |= {f"{name}.{field}": getattr(graph, field) for field in ("flops", "bytes", "time_s")}
    return flat


@pipelines
@pytest.mark.parametrize(
    ("option", "low", "high", "grows"),
    [
        ("visual_tokens", 16, 64, "prefill.flops"),
        ("visual_tokens", 64, 4096, "prefill.time_s"),
        ("text_tokens", 10, 40, "prefill.flops"),
        ("text_tokens", 10, 40, "kv_bytes"),
        ("batch", 1, 3, "vision.flops"),
        ("past_tokens", 10, 500, "decode.flops"),
        ("images", 1, 4, "vision.bytes"),
    ],
)
def test_more_of_anything_never_costs_less(pipeline: str, option: str, low: int, high: int, grows: str) -> None:
    program = pruned(pipeline)
    few, many = (figures(cost_of(program, **{option: n})) for n in (low, high))
    assert all(few[name] <= many[name] for name in few)
    if not (option == "visual_tokens" and pipeline == "cut-visual{from_layer=0}"):
        assert few[grows] < many[grows]


def test_a_step_after_no_text_costs_less_than_one_after_some() -> None:
    few, many = (cost_of(traced()[1], past_tokens=n, text_tokens=60).decode.flops for n in (0, 10))
    assert many - few == LAYERS * 4 * 32 * 10


def test_linear_work_doubles_with_the_batch_and_attention_grows_with_the_square() -> None:
    program = traced()[1]
    one, two = (cost_of(program, batch=b, visual_tokens=64, text_tokens=16) for b in (1, 2))
    assert two.prefill.flops == 2 * one.prefill.flops
    assert two.kv_bytes == 2 * one.kv_bytes
    a, b, c = (cost_of(program, visual_tokens=n, text_tokens=16).prefill.flops for n in (100, 200, 300))
    assert c - 2 * b + a == (LAYERS - 1) * 4 * 32 * 2 * 100 * 100
    first, second = (cost_of(program, visual_tokens=n, text_tokens=16) for n in (64, 128))
    assert second.kv_bytes - first.kv_bytes == LAYERS * 2 * 64 * 16 * 4


def test_pruning_costs_less_than_dense() -> None:
    dense = figures(cost_of(traced()[1], images=2))
    for pipeline in PIPELINES[1:]:
        cost = figures(cost_of(pruned(pipeline), images=2))
        assert cost["prefill.flops"] < dense["prefill.flops"], pipeline
        assert cost["kv_bytes"] <= dense["kv_bytes"], pipeline
        assert cost["vision.flops"] == dense["vision.flops"], pipeline


def test_bytes_count_the_weights_that_are_read_at_least() -> None:
    program = traced()[1]
    cost = cost_of(program)
    decoder = sum(program.weights.get(str(n.target)).nbytes for n in program.prefill.nodes if n.op == "get_attr")
    assert cost.prefill.bytes > decoder
    assert cost.decode.bytes > decoder
    assert cost.peak_bytes > sum(w.nbytes for _, w in program.weights.items())


def test_time_is_never_below_the_roofline() -> None:
    slow = Device("slow", 1e6, 1e6)
    cost = cost_of(traced()[1], device=slow)
    for graph in (cost.vision, cost.prefill, cost.decode):
        assert graph.time_s >= 0.9999 * max(graph.flops, graph.bytes) / 1e6
        assert graph.time_s <= 1.0001 * (graph.flops + graph.bytes) / 1e6


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"text_tokens": 0}, "text_tokens and batch 1 or more"),
        ({"batch": 0}, "text_tokens and batch 1 or more"),
        ({"visual_tokens": -1}, "visual_tokens, past_tokens 0 or more"),
        ({"images": -1}, "images, visual_tokens, past_tokens 0 or more"),
        ({"past_tokens": -5}, "past_tokens"),
        ({"device": "abacus"}, "device 'abacus' is not known; there are: .*cpu"),
    ],
)
def test_sizes_that_no_prompt_has_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        cost_of(traced()[1], **sizes)


def test_a_prompt_without_images_costs_no_vision() -> None:
    cost = cost_of(traced()[1], images=0)
    assert cost.vision.flops == 0
    assert cost.kv_bytes == 60 * LAYERS * 2 * 16 * 4


def test_costs_as_plain_data() -> None:
    data = cost_of(traced()[1]).to_json()
    assert set(data) == {"vision", "prefill", "decode", "kv_bytes", "peak_bytes"}
    assert all(set(data[name]) == {"flops", "bytes", "time_s"} for name in ("vision", "prefill", "decode"))


def test_the_ops_that_the_test_counts_are_the_ops_that_compute() -> None:
    assert {o.default for o in COUNTED} == {ops.attention, ops.encoder_attention, ops.attention_row}
