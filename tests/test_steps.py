"""Steps over a cache's whole buffers say what ordinary steps say. The capture itself needs a GPU: see the marks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.cache import GROWTH
from foveate.errors import InputError
from foveate.models.random import random_inputs, random_llava
from foveate.steps import Step

PIPELINES = (
    "",
    "recipe:yopo-25",
    "fastv{layer=1,keep=0.5},drop-visual-heads{keep=1,from_layer=0}",
    "cut-visual{from_layer=2},snapkv{capacity=12,window=4}",
)


class Repeats:
    """A `Capture` without a GPU: as a graph does, it repeats the step on the tensors that it saw."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, step: Step) -> tuple[Callable[[], object], Tensor]:
        self.captures += 1
        for _ in range(2):  # as warming up does; nothing may depend on how often a step ran before it counts
            result = step()

        def replay() -> None:
            self.replays += 1
            result.copy_(step())

        return replay, result


def answer(model: Any, inputs: dict[str, Tensor], tokens: int, **options: Any) -> Any:
    return model.generate(
        **inputs,
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.slow
@pytest.mark.parametrize("passes", PIPELINES)
def test_captured_steps_say_the_same_past_the_end_of_a_buffer(passes: str) -> None:
    model = random_llava(layers=3, kv_heads=2)
    optimized = foveate.optimize(model, passes)
    inputs = random_inputs(model, batch=3, text_tokens=9, padding="left")
    expected = answer(optimized, inputs, GROWTH + 9)
    optimized.capture = repeats = Repeats()
    found = answer(optimized, inputs, GROWTH + 9)
    assert torch.equal(found.sequences, expected.sequences)
    for mine, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    assert repeats.captures == 2, "once, and again when the buffers had grown"
    assert repeats.replays == GROWTH + 8
    assert found.past_key_values.seen == expected.past_key_values.seen
    for name, part in expected.past_key_values.text.items():
        torch.testing.assert_close(found.past_key_values.text[name].view(), part.view(), rtol=1e-5, atol=1e-5)


def test_steps_of_several_tokens_and_beams_are_not_captured() -> None:
    model = random_llava(layers=2)
    optimized = foveate.optimize(model, "")
    inputs = random_inputs(model, text_tokens=9)
    expected = answer(optimized, inputs, 6, num_beams=3).sequences
    optimized.capture = repeats = Repeats()
    assert torch.equal(answer(optimized, inputs, 6, num_beams=3).sequences, expected)
    with torch.no_grad():
        cache = optimized(**inputs).past_key_values
        before = repeats.replays
        optimized(input_ids=inputs["input_ids"][:, -2:], past_key_values=cache)
    assert repeats.replays == before


def test_without_a_gpu_it_is_refused() -> None:
    optimized = foveate.optimize(random_llava(layers=2), "")
    with pytest.raises(InputError, match="captured on a CUDA device; this model is on cpu"):
        optimized.capture_steps()
    assert optimized.capture_steps(False).capture is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("passes", PIPELINES)
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_cuda_graph_says_the_same(passes: str, backend: str) -> None:
    model = random_llava(layers=3, kv_heads=2, device="cuda")
    optimized = foveate.optimize(model, passes, backend=backend)
    inputs = random_inputs(model, batch=3, text_tokens=9, padding="left")
    expected = answer(optimized, inputs, GROWTH + 9)
    found = answer(optimized.capture_steps(), inputs, GROWTH + 9)
    assert torch.equal(found.sequences, expected.sequences)
    for mine, theirs in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
