"""Costs against what running the graphs really does."""

from __future__ import annotations

from dataclasses import astuple
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from foveate.errors import InputError
from foveate.ir.cost import Cost, cost_of
from foveate.ir.cost.devices import Device
from foveate.ir.cost.neighbors import image_grids
from foveate.ir.cost.sizes import Sizes
from foveate.ir.cost.work import ATTENTIONS, FLOPS
from foveate.ir.join import join
from foveate.ir.program import Program
from foveate.kernels import IMPLEMENTATIONS
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


def flash_on_cpu(q: Any, k: Any, v: Any, *rest: Any, **options: Any) -> int:
    """torch counts its other fused attention kernels so, and has no rule for this one."""
    batch, heads, queries, size = q
    return 4 * batch * heads * queries * k[2] * size


def inside(implementation: Any) -> Any:
    """What torch counts inside a foveate op, while its implementation runs."""
    flash = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash_on_cpu}

    def count(*args: Any, out_val: Any = None, **options: Any) -> int:
        with FlopCounterMode(display=False, custom_mapping=flash) as counter:
            implementation(*args, **options)
        return counter.get_total_flops()

    count._get_raw = True  # type: ignore[attr-defined]  # tensors, not shapes
    return count


COUNTED = {
    getattr(torch.ops.foveate, name): inside(IMPLEMENTATIONS[name])
    for name in (
        "attention",
        "experts",
        "neighbor_attention",
        "encoder_attention",
        "varlen_attention",
        "cross_attention",
        "mean_token",
        "attention_row",
        "received_attention",
        "attention_sums",
        "attention_with_sums",
        "neighbor_sums",
        "diverse_scores",
        "distinct_scores",
        "relevance",
        "determinant_scores",
        "visionzip",
        "prumerge",
        "raters",
        "rater_scores",
        "rater_rank",
        "merge_tokens",
        "tome",
        "received",
        "crossget",
        "cls_curve",
        "column_means",
        "segment_means",
        "segment_tokens",
    )
}


def counted(program: Program, graph: fx.Graph, sizes: dict[str, int]) -> int:
    """FLOPs that torch counts while a graph runs on zeros of these sizes, its attention kernels included."""
    symbols = {size.node.expr: sizes[name] for name, size in program.symbols.sizes.items() if name in sizes}
    inputs: list[Any] = []
    for node in graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta["val"]
        if not isinstance(value, Tensor):
            inputs.append(sizes["prefix"])
            continue
        if node.name == "grids":
            batch, visual, text = (sizes[name] for name in ("batch", "visual_tokens", "text_tokens"))
            grids = image_grids(Sizes(program, sizes), batch, visual, text) or ()
            inputs.append(torch.tensor([astuple(grid) for grid in grids], dtype=torch.int64).view(-1, 6))
            continue
        shape = [s if isinstance(s, int) else int(s.node.expr.subs(symbols)) for s in value.shape]
        if node.name == "visual_coords":
            # Which image a token is in is all that a count depends on.
            image = torch.arange(shape[1]) // program.info.tokens_per_image
            inputs.append(image[None, :, None].expand(shape).contiguous())
            continue
        inputs.append(torch.zeros(shape, dtype=value.dtype))
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        fx.GraphModule(program.weights, graph)(*inputs)
    return counter.get_total_flops()


def check_flops(pipeline: str, visual: int, text: int, batch: int, images: int, past: int, prefix: int) -> None:
    program = pruned(pipeline)
    spent = cost_of(
        program,
        visual_tokens=visual,
        text_tokens=text,
        batch=batch,
        images=images,
        past_tokens=past,
        prefix_tokens=prefix,
    )
    left = visual * program.tokens_left // program.info.tokens_per_image
    sizes = {"batch": batch, "images": batch * images, "visual_tokens": left, "text_tokens": text}
    sizes["prefix"] = prefix if images <= 1 else -1
    assert spent.vision.flops == counted(program, program.graphs["vision"], sizes)
    assert spent.prefill.flops == counted(program, join(program, program.prefill), sizes)
    step = {**sizes, "text_tokens": 1, "past_tokens": past}
    assert spent.decode.flops == counted(program, program.graphs["decode"], step)


@pytest.mark.slow
@pipelines
def test_flops_are_those_that_torch_counts(pipeline: str) -> None:
    check_flops(pipeline, visual=32, text=11, batch=3, images=2, past=7, prefix=4)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(
    pipeline=st.sampled_from(PIPELINES),
    visual=st.integers(0, 300),
    text=st.integers(1, 40),
    batch=st.integers(1, 3),
    images=st.integers(0, 3),
    past=st.integers(0, 50),
    before=st.floats(0, 1),
)
def test_flops_are_those_that_torch_counts_at_any_size(
    pipeline: str, visual: int, text: int, batch: int, images: int, past: int, before: float
) -> None:
    check_flops(pipeline, visual, text, batch, images, past, round(before * text))


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
    # Counts by rank are forecast for the highest rank, the number of text tokens: fewer of them than visual ones.
    many = {"images": 8, "text_tokens": 8}
    dense = figures(cost_of(traced()[1], **many))
    for pipeline in PIPELINES[1:]:
        cost = figures(cost_of(pruned(pipeline), **many))
        assert cost["prefill.flops"] < dense["prefill.flops"], pipeline
        assert cost["kv_bytes"] <= dense["kv_bytes"], pipeline
        if not pruned(pipeline).shortens:
            assert cost["vision.flops"] == dense["vision.flops"], pipeline


def test_bytes_count_the_weights_that_are_read_at_least() -> None:
    program = traced()[1]
    cost = cost_of(program)
    decoder = sum(program.weights.get(str(n.target)).nbytes for n in program.prefill.nodes if n.op == "get_attr")
    assert cost.prefill.bytes > decoder
    assert cost.decode.bytes > decoder
    assert cost.peak_bytes > sum(w.nbytes for _, w in program.weights.items())


def test_time_is_never_below_the_roofline() -> None:
    slow = Device("slow", {"float32": 1e6}, 1e6)
    cost = cost_of(traced()[1], device=slow)
    for graph in (cost.vision, cost.prefill, cost.decode):
        assert graph.time_s >= 0.9999 * max(graph.flops, graph.bytes) / 1e6
        assert graph.time_s <= 1.0001 * (graph.flops + graph.bytes) / 1e6


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"text_tokens": 0}, "text_tokens and batch 1 or more"),
        ({"batch": 0}, "text_tokens and batch 1 or more"),
        ({"visual_tokens": -1}, "visual_tokens must be 0 or more, it is -1"),
        ({"images": -1}, "images must be 0 or more"),
        ({"past_tokens": -5}, "past_tokens must be 0 or more"),
        ({"new_tokens": -1}, "new_tokens 0 or more"),
        ({"prefix_tokens": 61}, "prefix_tokens 0 to text_tokens"),
        ({"dtype": "float7"}, "dtype 'float7' is not known to a forecast; there are: .*int4"),
        ({"weight_bits": 5}, "weight_bits=5; allowed: 4, 8, 16, 32"),
        ({"kv_bits": 0}, "kv_bits=0; allowed"),
        ({"convention": "lol"}, "convention 'lol' is not known; there are: actual, yopo, lvpruning, llm-viewer"),
        ({"modules": [1]}, "counted by the convention lvpruning only"),
        ({"modules": [9], "convention": "lvpruning"}, "layer 9 is not one of this model's 3"),
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
    assert set(data) > {"vision", "prefill", "decode", "kv_bytes", "peak_bytes"}
    for name in ("vision", "prefill", "decode"):
        assert set(data[name]) > {"flops", "bytes", "time_s"}
        kinds = [data[name][f"{kind}_bytes"] for kind in ("weight", "activation", "kv")]
        assert data[name]["bytes"] == sum(kinds)


def test_the_ops_that_the_test_counts_are_the_ops_that_compute() -> None:
    assert {o.default for o in COUNTED} == {op for op in (*FLOPS, *ATTENTIONS) if op.namespace == "foveate"}


@pipelines
def test_torch_counts_a_running_model_as_the_forecast_does(pipeline: str) -> None:
    opt = optimized(pipeline)
    inputs = random_inputs(model(), batch=2, text_tokens=10, prefix=3)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        opt(**inputs)
    spent = cost_of(opt.program, batch=2, text_tokens=10, prefix_tokens=3)
    assert counter.get_total_flops() == spent.first_token_flops
