"""Published counts: by hand on a small model, and the figures that papers print on the models they print them for."""

from __future__ import annotations

from math import floor
from typing import Any

import pytest

from foveate.ir.cost import Cost, cost_of
from foveate.ir.cost.shapes import LayerShape, layer_shapes
from foveate.ir.cost.sizes import Sizes
from foveate.passes import DropVisualHeads
from tests.ir.programs import FFN, HEADS, KV_HEADS, LAYERS, TOKENS, fresh, pruned, traced
from tests.shipped import shipped, with_passes

DENSE = LayerShape(TOKENS, HEADS, KV_HEADS, FFN)
GONE = LayerShape(0, 0, 0, 0)


def shapes(pipeline: str) -> list[LayerShape]:
    program = pruned(pipeline)
    return layer_shapes(program, Sizes(program, {"visual_tokens": TOKENS, "text_tokens": 5, "batch": 1}))


@pytest.mark.parametrize(
    ("pipeline", "expected"),
    [
        ("", [DENSE] * 3),
        ("cut-visual{from_layer=1}", [DENSE, GONE, GONE]),
        ("cut-visual{from_layer=0}", [GONE] * 3),
        ("drop-visual-heads{keep=2,from_layer=0}", [LayerShape(TOKENS, 2, 1, FFN)] * 3),
        ("drop-visual-neurons{keep=0.5}", [LayerShape(TOKENS, HEADS, KV_HEADS, FFN // 2)] * 3),
        ("fastv{layer=1,keep=0.5}", [DENSE, *[LayerShape(TOKENS // 2, HEADS, KV_HEADS, FFN)] * 2]),
        # From layer 1 on nothing of the visual stream reaches the text any more.
        ("drop-visual-heads{keep=0,from_layer=1}", [DENSE, GONE, GONE]),
    ],
)
def test_what_is_left_of_each_layer(pipeline: str, expected: list[LayerShape]) -> None:
    found = shapes(pipeline)
    if "heads{keep=2" in pipeline:
        # Weights decide which heads stay, and so how many key heads they share.
        assert [(s.tokens, s.heads, s.neurons) for s in found] == [(s.tokens, s.heads, s.neurons) for s in expected]
        assert all(1 <= s.kv_heads <= KV_HEADS for s in found)
    else:
        assert found == expected


def test_a_layer_without_heads_in_the_middle_keeps_its_ffn() -> None:
    mask = [[True] * HEADS, [False] * HEADS, [True] * HEADS]
    program = fresh()
    DropVisualHeads(mask=mask, from_layer=0).apply(program)
    found = layer_shapes(program, Sizes(program, {"visual_tokens": TOKENS, "text_tokens": 5, "batch": 1}))
    assert found == [DENSE, LayerShape(TOKENS, 0, 0, FFN), DENSE]


def test_yopo_by_hand() -> None:
    spent = cost_of(traced(HEADS)[1], convention="yopo", batch=2)
    layer = 2 * TOKENS * (4 * 32 * 32 + 3 * 32 * FFN) + 4 * TOKENS**2 * 32
    assert spent.prefill.flops == 2 * LAYERS * layer
    assert spent.vision.flops == 0
    assert spent.prefill.time_s == cost_of(traced(HEADS)[1], batch=2).prefill.time_s


def test_lvpruning_by_hand() -> None:
    program = traced(HEADS)[1]
    spent, modules = (cost_of(program, convention="lvpruning", text_tokens=7, modules=m) for m in ((), (1, 2)))
    linears = LAYERS * 2 * (TOKENS + 7) * (4 * 32 * 32 + 3 * 32 * FFN) + 2 * (TOKENS + 7) * 32 * 64
    assert spent.prefill.flops == linears
    assert modules.prefill.flops - linears == 2 * 2 * 2 * 32 * 32 * (6 * TOKENS + 2 * 7)
    # The tower has two layers; its feature is the last but one, and the paper counts both.
    patches, d = 16, 16
    tower = 2 * patches * (3 * 8 * 8) * d + 2 * 2 * (patches + 1) * 12 * d * d + 2 * patches * (d * 32 + 32 * 32)
    assert spent.vision.flops == tower


def test_llm_viewer_counts_every_row_of_a_batch() -> None:
    one, two = (cost_of(traced()[1], convention="llm-viewer", batch=b) for b in (1, 2))
    assert two.prefill.flops == 2 * one.prefill.flops
    assert two.prefill.weight_bytes == one.prefill.weight_bytes
    assert two.prefill.kv_bytes == 2 * one.prefill.kv_bytes


def tflops(spent: Cost) -> float:
    return spent.first_token_flops / 1e12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "passes", "published"),
    [
        ("llava-1.5-7b", "", 7.63),
        ("llava-1.5-7b", "recipe:yopo-25", 1.91),
        ("llava-1.5-13b", "", 14.89),
        ("llava-1.5-13b", "recipe:yopo-25", 3.72),
    ],
)
def test_figures_of_yopo(model: str, passes: str, published: float) -> None:
    spent = cost_of(with_passes(model, passes), convention="yopo")
    assert tflops(spent) == pytest.approx(published, rel=0.005)


def lvpruning(keep: float) -> str:
    """Kept before layers 1, 8 and 16: keep, keep - 0.2 and keep - 0.4 of all tokens, rounded down."""
    kept = [floor(576 * (keep - 0.2 * i) + 1e-9) for i in range(3)]
    shares = [(b + 0.5) / a for a, b in zip((576, *kept), kept)]
    return ",".join(f"random-prune{{layer={layer},keep={share}}}" for layer, share in zip((1, 8, 16), shares))


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "published"), [(None, 8.38), (0.6, 3.97), (0.5, 3.18), (0.45, 2.79)])
def test_figures_of_lvpruning(keep: float | None, published: float) -> None:
    passes, modules = (lvpruning(keep), (1, 8, 16)) if keep else ("", ())
    spent = cost_of(with_passes("llava-1.5-7b", passes), convention="lvpruning", text_tokens=30, modules=modules)
    assert tflops(spent) == pytest.approx(published, rel=0.005)
    assert floor(100 * tflops(spent)) / 100 == published, "the paper prints two digits, the rest cut off"


@pytest.mark.slow
def test_the_modules_of_lvpruning() -> None:
    counts = [
        tflops(cost_of(shipped("llava-1.5-7b"), convention="lvpruning", text_tokens=30, modules=modules))
        for modules in ((), (1, 8, 16))
    ]
    assert counts[1] - counts[0] == pytest.approx(0.71, rel=0.005)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("visual", "published"),
    [(576, (8.5, 30.3, 22.2, 4.1)), (144, (2.7, 9.9, 15.4, 0.9))],
)
def test_figures_of_llm_viewer(visual: int, published: tuple[float, ...]) -> None:
    options: dict[str, Any] = {"convention": "llm-viewer", "device": "a100", "dtype": "float16"}
    work = cost_of(shipped("llava-1.5-7b"), visual_tokens=visual, text_tokens=60, **options).prefill
    found = (work.flops / 1e12, 1e3 * work.time_s, work.bytes / 1e9, work.written / 1e9)
    # Printed with one digit after the point, which is coarser than a hundredth of the small ones.
    assert tuple(round(value, 1) for value in found) == published
    assert found == pytest.approx({576: (8.453, 30.31, 22.21, 4.05), 144: (2.665, 9.89, 15.38, 0.94)}[visual], rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "published"), [("int8", (15.2, 11.1, 2.0)), ("int4", (14.2, 5.6, 1.0))])
def test_time_and_bytes_of_llm_viewer_in_few_bits(dtype: str, published: tuple[float, ...]) -> None:
    """Its FLOPs in few bits are those of fp16 divided by two and four, which counts nothing; they are not ours."""
    options: dict[str, Any] = {"convention": "llm-viewer", "device": "a100", "text_tokens": 60}
    work = cost_of(shipped("llava-1.5-7b"), dtype=dtype, **options).prefill
    assert tuple(round(v, 1) for v in (1e3 * work.time_s, work.bytes / 1e9, work.written / 1e9)) == published
