"""Programs on ONNX Runtime against the same programs on torch."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

import foveate
from foveate.errors import BackendError, InputError
from foveate.ir.program import Program
from foveate.models.random import random_inputs, random_llava

PIPELINES = (
    "",
    "cut-visual{from_layer=2}",
    "drop-visual-heads{keep=2,from_layer=1}",
    "drop-visual-heads{keep=2,from_layer=1,renorm=false}",
    "drop-visual-heads{keep=0,from_layer=2}",
    "drop-visual-neurons{keep=0.5}",
    "fastv{layer=1,keep=0.5}",
    "random-prune{layer=1,keep=0.29,seed=3}",
    "grid-prune{layer=1,keep=0.7}",
    "pyramiddrop{layers=[1,2,3],keep=0.5}",
    "neighbor-attention{radius=1}",
    "neighbor-attention{radius=2,metric=euclidean,causal=true,see_prefix=false}",
    "neighbor-attention{radius=2,metric=raster}",
    "fastervlm{keep=0.5}",
    "average-pool{factor=2}",
    "resize{grid=2}",
    "fastervlm{keep=0.7},fastv{layer=1,keep=0.5},neighbor-attention{radius=1},cut-visual{from_layer=3}",
)
PROMPTS = (
    {},
    {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"},
    {"batch": 2, "images": 0},
    {"batch": 3, "images_per_row": [1, 2, 1], "padding": "right", "prefix": 0},
)


@functools.cache
def source(kv_heads: int | None = None, dtype: torch.dtype = torch.float32):
    return random_llava(layers=4, kv_heads=kv_heads, dtype=dtype)


@functools.cache
def traced(kv_heads: int | None = None) -> Program:
    return foveate.trace(source(kv_heads))


def check(passes: str, kv_heads: int | None, prompts=PROMPTS) -> None:
    model, program = source(kv_heads), traced(kv_heads)
    eager = foveate.optimize(model, passes, traced=program)
    there = foveate.optimize(model, passes, traced=program, backend="onnx")
    for prompt in prompts:
        inputs = random_inputs(model, **prompt)
        with torch.inference_mode():
            expected, found = eager(**inputs), there(**inputs)
            answers = [each.generate(**inputs, max_new_tokens=20, do_sample=False) for each in (eager, there)]
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
        assert set(found.kept or {}) == set(expected.kept or {})
        for layer, places in (expected.kept or {}).items():
            assert torch.equal(found.kept[layer], places)
        assert torch.equal(*answers)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [None, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("passes", PIPELINES)
def test_logits_kept_tokens_and_answers_are_those_of_torch(passes: str, kv_heads: int | None) -> None:
    check(passes, kv_heads)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.7, 0.29, 0.5, 0.04, 1 / 3])
def test_as_many_tokens_stay_as_python_counts(keep: float) -> None:
    # 0.7 * 10 is 7.0 and 0.29 * 100 is 28.999...: no fraction rounds as floats do.
    check(f"random-prune{{layer=1,keep={keep}}}", None, ({}, {"images_per_row": [3, 1], "padding": "left"}))


def test_beams_and_several_tokens_at_once() -> None:
    model = source()
    inputs = random_inputs(model, batch=2)
    eager, there = (
        foveate.optimize(model, "fastv{layer=1,keep=0.5}", traced=traced(), backend=b) for b in ("eager", "onnx")
    )
    with torch.inference_mode():
        beams = [each.generate(**inputs, max_new_tokens=6, num_beams=3, do_sample=False) for each in (eager, there)]
        assert torch.equal(*beams)
        more = torch.tensor([[5, 6, 7], [8, 9, 10]])
        logits = [each(input_ids=more, cache=each(**inputs).cache).logits for each in (eager, there)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_half_precision_agrees_within_its_own_rounding() -> None:
    model = source(dtype=torch.float16)
    inputs = random_inputs(model)
    with torch.inference_mode():
        expected, found = (
            foveate.optimize(model, "cut-visual{from_layer=2}", backend=b)(**inputs).logits for b in ("eager", "onnx")
        )
    assert found.dtype == torch.float16
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)


def test_what_has_no_form_in_onnx_is_refused_by_the_name_of_its_pass() -> None:
    with pytest.raises(BackendError, match=r"sparsevlm\{.*cannot be exported to ONNX.*rater_rank"):
        foveate.optimize(source(), "sparsevlm{layers=[0,2],counts=rank,scale=0.5}", traced=traced(), backend="onnx")


def test_training_is_refused() -> None:
    there = foveate.optimize(source(), traced=traced(), backend="onnx")
    inputs: dict[str, Tensor] = random_inputs(source())
    with pytest.raises(InputError, match="does not train"):
        there(**inputs, labels=inputs["input_ids"])
