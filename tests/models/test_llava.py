"""LLaVA with other towers and decoders than LLaVA-1.5's: what runs, and what is refused by name.

`test_running` and `test_vision_selection` hold one with a SigLIP tower and a Qwen2 decoder to transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import foveate
from foveate.errors import PassError, UnsupportedModelError
from foveate.models.registry import trace_program
from tests.models import tiny
from tests.models.prompts import made
from tests.oracle.masked import masked_forward, masked_greedy
from tests.oracle.masks import Masks, Prune

CLIP = {"model_type": "clip_vision_model", "image_size": 32}
FIRST = {"vision_feature_select_strategy": "default", "vision_feature_layer": -2}


@pytest.mark.parametrize("decoder", ["mistral", "qwen2"])
def test_a_clip_tower_with_other_decoders(decoder: str) -> None:
    model = tiny.llava(decoder, vision=CLIP, **FIRST)
    mine = foveate.optimize(model, "fastv{layer=1,keep=0.5},cut-visual{from_layer=2}")
    masks = Masks(2, None, None, (Prune(1, 0.5, "fastv"),))
    for seed, rows in enumerate(([[1]], [[2], [0], [1]])):
        inputs = made(model, seed, rows).inputs
        with torch.no_grad():
            expected = masked_forward(model, inputs, masks)
            torch.testing.assert_close(mine(**inputs).logits[:, 0], expected.logits, rtol=0, atol=1e-5)
            answer = mine.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            assert torch.equal(answer, masked_greedy(model, inputs, masks, 4))


def test_features_of_several_layers_of_a_siglip_tower() -> None:
    model = tiny.llava(vision_feature_layer=[-2, -1])
    inputs = made(model, 0, [[2], [0]]).inputs
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]
        torch.testing.assert_close(foveate.optimize(model)(**inputs).logits[:, -1], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("passes", ["tome{merge=1}", "crossget{merge=1}", "cls-curve{layer=0}", "resize{grid=2}"])
def test_what_needs_a_cls_token_says_so(passes: str) -> None:
    name = passes.partition("{")[0]
    with pytest.raises(PassError, match=f"{name}: the tower of this llava has no CLS token, which {name} needs; vis"):
        foveate.optimize(tiny.llava(), passes)


def make(decoder: str = "qwen2", **changes: Any) -> Callable[[], Any]:
    return lambda: tiny.llava(decoder, "meta", **changes)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make("phi3"), r"decoder 'phi3' is not supported in a LLaVA; supported: llama, mistral, qwen2"),
        (make("mistral", text={"sliding_window": 9}), r"sliding window attention \(9 tokens\) is not supported"),
        (make(vision={"vision_use_head": True}), "a SigLIP tower with a pooling head is not supported"),
        (make(vision_feature_select_strategy="default"), "'default' drops the first patch, .* use 'full'"),
        (make(vision=CLIP, vision_feature_select_strategy="full"), "'full' keeps the CLS token, .* use 'default'"),
        (
            make(vision={"model_type": "pixtral"}),
            "vision tower 'pixtral' is not supported in a LLaVA; supported: clip_vision_model, siglip_vision_model",
        ),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        trace_program(make())
