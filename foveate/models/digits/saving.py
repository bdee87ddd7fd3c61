"""Writes a trained model as a folder that `from_pretrained` reads with no network."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import GenerationConfig, LlavaForConditionalGeneration, LlavaProcessor

MOST_BYTES = 12_000_000
"""The weights file may be no larger: it ships inside the package."""


def save_folder(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> int:
    """Stores weights as float16, with configs and processor; returns the bytes of the weights file."""
    folder.mkdir(parents=True, exist_ok=True)
    text = model.config.text_config
    stored = copy.deepcopy(model).to(torch.float16)
    stored.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=text.eos_token_id,
        pad_token_id=text.pad_token_id,
        do_sample=False,
        max_new_tokens=8,
    )
    stored.save_pretrained(folder)
    # The configuration names float32, so a plain `from_pretrained` upcasts: float16 is for storage only.
    config = copy.deepcopy(stored.config)
    for part in (config, config.text_config, config.vision_config):
        part.dtype = torch.float32
    config.save_pretrained(folder)
    processor.save_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    if size > MOST_BYTES:
        raise ValueError(f"the weights take {size:,} bytes; at most {MOST_BYTES:,} may ship")
    return size
