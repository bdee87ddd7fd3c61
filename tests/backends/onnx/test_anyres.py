"""Families that cut images into tiles, on ONNX Runtime against torch."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

import foveate
from foveate.ir.program import Program
from tests.models import tiny
from tests.models.prompts import made

MODELS = {"llava-next": tiny.llava_next, "llava-onevision": tiny.llava_onevision}
PIPELINES = ("", "neighbor-attention{radius=1},drop-visual-neurons{keep=0.5},fastv{layer=1,keep=0.5}")


@functools.cache
def traced(name: str) -> tuple[Any, Program]:
    source = MODELS[name]()
    return source, foveate.trace(source)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("passes", PIPELINES)
def test_logits_kept_tokens_and_answers_are_those_of_torch(name: str, passes: str) -> None:
    source, program = traced(name)
    eager = foveate.optimize(source, passes, traced=program)
    there = foveate.optimize(source, passes, traced=program, backend="onnx")
    videos = [[[1, 1], [0, 2]]] if name == "llava-onevision" else []
    for seed, rows in enumerate([[[1], [2], [0]], [[0], [0]], *videos]):
        inputs = made(source, seed, rows).inputs
        with torch.inference_mode():
            expected, found = eager(**inputs), there(**inputs)
            answers = [each.generate(**inputs, max_new_tokens=6, do_sample=False) for each in (eager, there)]
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
        assert set(found.kept or {}) == set(expected.kept or {})
        for layer, places in (expected.kept or {}).items():
            assert torch.equal(found.kept[layer], places)
        assert torch.equal(*answers)
