from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from foveate.models.random import random_llava

LAYERS, HEADS, FFN, TOKENS = 3, 4, 48, 4


def assert_near(actual: Tensor, expected: Tensor, *, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def small(**sizes: Any) -> LlavaForConditionalGeneration:
    defaults: dict[str, Any] = {"layers": LAYERS, "hidden": 32, "heads": HEADS, "ffn": FFN}
    vision = {"visual_tokens": TOKENS, "vision_layers": 2, "vision_hidden": 16}
    return random_llava(**{**defaults, **vision, "vocab": 64, **sizes})


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return small(kv_heads=2)


def dense(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The next-token logits [B, V] of transformers alone."""
    attended = inputs["attention_mask"]
    places = (attended.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits: Tensor = model(**inputs, position_ids=places).logits
    last = (attended * torch.arange(attended.shape[1])).argmax(1)
    return logits[torch.arange(len(last)), last]


def visual(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    image_token: int = model.config.image_token_id
    return inputs["input_ids"] == image_token


def random_mask(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
