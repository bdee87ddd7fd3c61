"""Accuracy by greedy generation, one question a prompt, batched with left padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from foveate.models.digits import Sample

LONGEST_ANSWER = 5
"""Tokens of the longest answer: a row of four and `</s>`."""


def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[Sample],
    batch: int = 32,
) -> list[str]:
    """What the model says to each sample, special tokens removed."""
    said: list[str] = []
    for start in range(0, len(samples), batch):
        part = samples[start : start + batch]
        inputs = processor(
            text=[sample.prompt for sample in part],
            images=[sample.image for sample in part],
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        fresh = out[:, inputs["input_ids"].shape[1] :]
        said += [text.strip() for text in processor.batch_decode(fresh, skip_special_tokens=True)]
    return said


def accuracy(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[Sample],
    batch: int = 32,
) -> float:
    """Share of samples answered exactly right, 0..1."""
    said = answers(model, processor, samples, batch)
    return sum(text == sample.answer for text, sample in zip(said, samples, strict=True)) / len(samples)
