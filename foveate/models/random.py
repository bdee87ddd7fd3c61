"""LLaVA models with random weights, and inputs for them: for tests, timing and cost estimates.

The layout is the one of LLaVA 1.5 (CLIP tower with a CLS token, feature layer -2, two-layer MLP
projector, Llama decoder); only the sizes are free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

PATCH = 8
PAD_ID = 0
BOS_ID = 1
FIRST_TEXT_ID = 2

Padding = Literal["none", "left", "right"]


def random_llava(
    *,
    layers: int = 4,
    hidden: int = 64,
    heads: int = 4,
    kv_heads: int | None = None,
    ffn: int = 96,
    visual_tokens: int = 16,
    vision_layers: int = 3,
    vision_hidden: int = 32,
    vision_heads: int = 2,
    vocab: int = 128,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> LlavaForConditionalGeneration:
    """A LLaVA in eval mode whose weights depend on the sizes, `seed` and the device type alone.

    `visual_tokens` is the number of tokens of one image and must be a square; an image has
    `8 * sqrt(visual_tokens)` pixels a side. `kv_heads` defaults to `heads`. Token 0 pads, token 1
    starts a row, token `vocab - 1` stands for an image, and no token ends a text, so that
    `generate` always makes as many tokens as it is asked for. On the "meta" device no memory is
    taken. PyTorch's global random state is left as it was.
    """
    kv_heads = heads if kv_heads is None else kv_heads
    grid = _square_root(visual_tokens)
    _require_multiple("hidden", hidden, "2 * heads", 2 * heads)
    _require_multiple("heads", heads, "kv_heads", kv_heads)
    _require_multiple("vision_hidden", vision_hidden, "vision_heads", vision_heads)
    if vocab < FIRST_TEXT_ID + 2:
        raise ValueError(f"vocab must be at least {FIRST_TEXT_ID + 2}, got {vocab}")
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_hidden,
            intermediate_size=4 * vision_hidden,
            projection_dim=vision_hidden,
            num_hidden_layers=vision_layers,
            num_attention_heads=vision_heads,
            image_size=PATCH * grid,
            patch_size=PATCH,
        ),
        text_config=LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=ffn,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            max_position_embeddings=4096,
            pad_token_id=PAD_ID,
            bos_token_id=BOS_ID,
            eos_token_id=None,
            tie_word_embeddings=False,
        ),
        image_token_index=vocab - 1,
        image_seq_length=visual_tokens,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    return _build(config, seed=seed, dtype=dtype, device=torch.device(device))


def random_inputs(
    model: LlavaForConditionalGeneration,
    *,
    batch: int = 1,
    images: int = 1,
    text_tokens: int = 12,
    seed: int = 0,
    padding: Padding = "none",
    images_per_row: Sequence[int] | None = None,
    prefix: int = 3,
) -> dict[str, Tensor]:
    """Inputs as the LLaVA processor makes them, on the model's device.

    A row is `prefix` text tokens (the first one starts the row), then its images with one text
    token between two of them, then the rest of its text. Returns

    - `input_ids` [batch, S], int64; each image is `image_seq_length` image tokens;
    - `attention_mask` [batch, S], int64; 0 where a row is padded;
    - `pixel_values` [images of all rows, 3, H, H] in the model's dtype; absent without images.

    Every row has `images` images, or those of `images_per_row`, which also sets the batch size.
    A row has `text_tokens` text tokens; with padding, row b has about b fewer, so that the rows'
    lengths differ. Without padding all rows must come out equally long.
    """
    counts = _image_counts(batch, images, images_per_row)
    lengths = _text_lengths(counts, text_tokens, prefix, padding)
    generator = torch.Generator().manual_seed(seed)
    rows = [_row(model.config, count, length, prefix, generator) for count, length in zip(counts, lengths, strict=True)]
    input_ids, attention_mask = _pad(rows, padding)
    device = model.device
    inputs = {"input_ids": input_ids.to(device), "attention_mask": attention_mask.to(device)}
    if sum(counts) > 0:
        size = model.model.vision_tower.config.image_size
        pixels = torch.randn(sum(counts), 3, size, size, generator=generator)
        inputs["pixel_values"] = pixels.to(device=device, dtype=model.dtype)
    return inputs


def _square_root(visual_tokens: int) -> int:
    grid = math.isqrt(visual_tokens) if visual_tokens > 0 else 0
    if visual_tokens < 1 or grid * grid != visual_tokens:
        raise ValueError(f"visual_tokens must be a square number (4, 16, 576, ...), got {visual_tokens}")
    return grid


def _require_multiple(name: str, value: int, of: str, divisor: int) -> None:
    if divisor < 1 or value < 1 or value % divisor:
        raise ValueError(f"{name} must be a positive multiple of {of}, got {value} and {divisor}")


def _build(
    config: LlavaConfig, *, seed: int, dtype: torch.dtype, device: torch.device
) -> LlavaForConditionalGeneration:
    # transformers initialises from the global generators, which callers did not ask us to move.
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked), torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    if device.type != "meta":
        _fill(model, seed)
    assert isinstance(model, LlavaForConditionalGeneration)
    return model.eval()


def _fill(model: LlavaForConditionalGeneration, seed: int) -> None:
    """Weights under which attention is peaked and every part of the model matters.

    The library's own scale (0.02 whatever the width) makes the attention of a small model nearly
    uniform, which hides mistakes in masks and scores. Drawing in float32, parameter by parameter,
    also makes the weights the same for every dtype and library version.
    """
    generator = torch.Generator(device=model.device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device, dtype=torch.float32)
            parameter.copy_(_scaled(name, noise))
        # An image token is never the most likely next token, as in a trained model.
        model.lm_head.weight[model.config.image_token_id] = 0


def _scaled(name: str, noise: Tensor) -> Tensor:
    """The parameter `name` from unit normal `noise` of its shape."""
    if name.endswith(".bias"):
        return 0.1 * noise
    if "embed" in name and "patch" not in name:
        return noise  # token, position and class embeddings: unit size, as the hidden states
    if noise.ndim == 1:
        return 1 + 0.1 * noise  # norms
    fan_in = noise[0].numel()
    gain = 1.4 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
    return noise * (gain / math.sqrt(fan_in))


def _image_counts(batch: int, images: int, images_per_row: Sequence[int] | None) -> list[int]:
    counts = [images] * batch if images_per_row is None else list(images_per_row)
    if images_per_row is not None and batch not in (1, len(counts)):
        raise ValueError(f"batch is {batch} but images_per_row has {len(counts)} rows")
    if not counts or min(counts) < 0:
        raise ValueError(f"need at least one row and no negative number of images, got {counts}")
    return counts


def _text_lengths(counts: list[int], text_tokens: int, prefix: int, padding: Padding) -> list[int]:
    """Text tokens of each row: `text_tokens`, or with padding up to b fewer in row b."""
    if padding not in ("none", "left", "right"):
        raise ValueError(f'padding must be "none", "left" or "right", got {padding!r}')
    if padding == "none" and len(set(counts)) > 1:
        raise ValueError(f'rows with {counts} images need padding="left" or "right"')
    # Before the images, between them, and one token after them to predict from.
    least = [prefix + max(count - 1, 0) + 1 for count in counts]
    if prefix < 0 or text_tokens < max(least):
        raise ValueError(f"text_tokens must be at least {max(least)} here, got {text_tokens}")
    if padding == "none":
        return [text_tokens] * len(counts)
    return [text_tokens - row % (text_tokens - minimum + 1) for row, minimum in enumerate(least)]


def _row(config: LlavaConfig, images: int, text_tokens: int, prefix: int, generator: torch.Generator) -> Tensor:
    """Token ids [text_tokens + images * image_seq_length] of one row."""
    text = torch.randint(FIRST_TEXT_ID, config.image_token_id, (text_tokens,), generator=generator)
    text[0] = BOS_ID
    image = torch.full((config.image_seq_length,), config.image_token_id)
    pieces = [text[:prefix]]
    for index in range(images):
        last = index == images - 1
        start = prefix + index
        pieces += [image, text[start:] if last else text[start : start + 1]]
    return torch.cat(pieces if images else [text])


def _pad(rows: list[Tensor], padding: Padding) -> tuple[Tensor, Tensor]:
    """Rows of different lengths to ids and attention mask, both [batch, longest]."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), PAD_ID)
    attended = torch.zeros((len(rows), longest), dtype=torch.int64)
    for index, row in enumerate(rows):
        start = longest - len(row) if padding == "left" else 0
        ids[index, start : start + len(row)] = row
        attended[index, start : start + len(row)] = 1
    return ids, attended


__all__ = ["random_inputs", "random_llava"]
