"""Choosing tokens of images in one sequence: ONNX Runtime keeps those that eager torch keeps, whatever their sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import foveate
from foveate.backends.base import lower
from foveate.errors import BackendError
from foveate.model import OptimizedModel
from tests.models.prompts import made
from tests.models.test_running import optimized, source

MODELS = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")
PASSES = ("fastervlm{keep=0.5}", "divprune{keep=0.29}", "cdpruner{keep=0.6,clip=none}")
ROWS = ([[1, 0]], [[2, 0], [0, 0], [1, 1]], [[0, 1]], [[0, 0]], [[3, 0], [1, 0]])
"""Images in each prompt, and videos."""


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("passes", PASSES)
def test_the_same_tokens_stay(name: str, passes: str) -> None:
    eager = optimized(name, passes)
    runners = lower(eager.program, "onnx")
    there = OptimizedModel(eager.program, source(name).config, None, "onnx", lambda: runners)
    for seed, rows in enumerate(ROWS * 2):
        inputs = made(source(name), seed, rows).inputs
        with torch.inference_mode():
            expected, found = eager(**inputs), there(**inputs)
        assert expected.kept is not None and found.kept is not None
        assert torch.equal(found.kept[0], expected.kept[0]), (seed, rows)
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("opset", [20, 23])
def test_a_package_is_held_to_eager_torch(tmp_path: Path, opset: int) -> None:
    made = foveate.export(optimized("qwen2-vl", PASSES[0]), output=tmp_path / "out", opset=opset)
    assert made.parity is not None and made.parity.ok and made.parity.kept
    loaded = foveate.load(tmp_path / "out")
    assert loaded.program.shortens


def test_what_goes_by_difference_in_rounds_is_refused_by_name() -> None:
    with pytest.raises(BackendError, match=r"vispruner cannot be exported to ONNX: foveate.segment_tokens.default"):
        lower(optimized("qwen2-vl", "vispruner").program, "onnx")
