"""A digits model that was never trained, small enough to trace in a moment, with its processor."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from foveate.models.digits.architecture import build_config
from foveate.models.digits.processing import build_processor
from tests.ir.programs import once


@once
def small_digits(layers: int = 2) -> tuple[Any, Any]:
    """(model, processor); nobody may change them."""
    processor = build_processor()
    config = build_config(processor.tokenizer)
    config.text_config.num_hidden_layers = layers
    config.vision_config.num_hidden_layers = 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlavaForConditionalGeneration(config).eval(), processor
