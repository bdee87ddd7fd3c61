"""LLaVA-NeXT: a CLIP tower over tiles of any image, an MLP projector, and a Llama, Mistral or Qwen2 decoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.errors import UnsupportedModelError
from foveate.ir.layout import Layout
from foveate.ir.program import ModelInfo
from foveate.models import anyres
from foveate.models.anyres import Vision
from foveate.models.decoder import PATHS, ROLES, Decoder, sizes
from foveate.models.llava import tower_layers, vision_inputs
from foveate.models.tiles import POSITION_AXES, Given, positions

__all__ = [
    "GIVEN",
    "POSITION_AXES",
    "Decoder",
    "Vision",
    "describe",
    "images_in",
    "layout",
    "pictures",
    "positions",
    "sample",
    "tower_layers",
    "vision_given",
    "vision_inputs",
]

GIVEN = ("pixel_values", "image_sizes")
"""What such a family takes beside input ids and attention mask."""

DECODERS = ("llama", "mistral", "qwen2")


def describe(config: Any) -> ModelInfo:
    """Sizes and names of a LLaVA-NeXT with this configuration; a tile counts as an image.

    Raises UnsupportedModelError for a tower, decoder, rotary embedding or image sizes that are not supported.
    """
    text, vision = config.text_config, config.vision_config
    if vision.model_type != "clip_vision_model":
        raise UnsupportedModelError(
            f"vision tower {vision.model_type!r} is not supported in a LLaVA-NeXT; a CLIP tower (clip_vision_model) is"
        )
    if text.model_type not in DECODERS:
        raise UnsupportedModelError(
            f"decoder {text.model_type!r} is not supported in a LLaVA-NeXT; supported: {', '.join(DECODERS)}"
        )
    if getattr(text, "sliding_window", None) is not None:
        raise UnsupportedModelError(f"sliding window attention ({text.sliding_window} tokens) is not supported")
    if config.vision_feature_select_strategy != "default":
        raise UnsupportedModelError(
            f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} keeps the CLS token, which has "
            "no place in the grid of visual tokens; use 'default'"
        )
    anyres.check_pinpoints(config, vision.image_size)
    side = vision.image_size // vision.patch_size
    return ModelInfo(
        family="llava_next",
        **sizes(text),
        image_token_id=config.image_token_id,
        grid=(side, side),
        image_size=(vision.num_channels, vision.image_size, vision.image_size),
        paths=dict(PATHS),
        roles=dict(ROLES),
        config=config.to_dict(),
        uniform=False,
    )


def vision_given(info: ModelInfo, given: Given) -> dict[str, Tensor] | None:
    """What the vision graph takes, the tiles of all images; None where there is no image.

    Raises InputError for pixels that do not fit their sizes.
    """
    sizes = anyres.sizes_of(given)
    if not given.keys() & set(GIVEN):
        return None
    tiles = anyres.tiles_of(info, given["pixel_values"], [anyres.tile_count(info, size) for size in sizes])
    return {"pixel_values": tiles} if len(tiles) else None


def layout(info: ModelInfo, given: Given, kinds: Tensor, out: Mapping[str, Tensor] | None) -> Layout:
    """What stands at the image tokens `kinds` [P]; every tile has a grid of its own, the whole image too.

    Raises InputError where the images are not as many tokens as the prompts hold.
    """
    numbers, tiles = [torch.zeros(0, dtype=torch.int64)], 0
    for size in anyres.sizes_of(given):
        mine = anyres.image_numbers(info, size)
        numbers.append(torch.where(mine == anyres.NEWLINE, mine, mine + tiles * info.tokens_per_image))
        tiles += anyres.tile_count(info, size)
    found = torch.cat(numbers).to(kinds.device)
    anyres.check_count("image", len(kinds), len(found))
    return anyres.patches(info, found, tiles)


def sample(info: ModelInfo, images: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
    """Random images of random sizes: how many tokens each becomes, and what a processor would make of them."""
    sizes = anyres.sample_sizes(info, images, generator)
    tokens = [len(anyres.image_numbers(info, size)) for size in sizes.tolist()]
    return tokens, anyres.sample_given(info, sizes, generator) if images else {}


def pictures(info: ModelInfo, given: Given) -> list[Tensor]:
    """Pixels [3, height, width] of each tile, as the tower sees them."""
    found = vision_given(info, given)
    return [] if found is None else list(found["pixel_values"])


def images_in(info: ModelInfo, given: Given, ids: Tensor) -> dict[str, list[int]]:
    """How many rows of what is given belong to each prompt of ids [B, S], by name."""
    sizes = anyres.sizes_of(given)
    images = anyres.counts_in(ids, info.image_token_id, [len(anyres.image_numbers(info, size)) for size in sizes])
    tiles = anyres.sums([anyres.tile_count(info, size) for size in sizes], images)
    padded = "pixel_values" in given and given["pixel_values"].dim() == 5
    counts = {"image_sizes": images, "pixel_values": images if padded else tiles}
    return {name: each for name, each in counts.items() if name in given and len(given[name]) == sum(each)}
