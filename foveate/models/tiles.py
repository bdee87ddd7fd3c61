"""Running families whose images, or tiles of images, all have one size and become equally many tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.ir.layout import NOWHERE, Layout
from foveate.ir.program import ModelInfo
from foveate.models.recording import Inputs, Size

Given = Mapping[str, Tensor]
"""What a processor made beside input ids and attention mask, by name; only what is there."""

GIVEN = ("pixel_values",)
"""What of it such a family takes."""

POSITION_AXES: tuple[int, ...] = ()
"""Axes of the position ids before [batch, sequence]."""


def vision_inputs(info: ModelInfo, size: Size) -> Inputs:
    """Inputs of `Vision`, the module from pixels to embeddings."""
    return {"pixel_values": ((size("images"), *info.image_size), None)}


def tower_layers(model: Any) -> int:
    """How many tower layers the features need, where they come from the last."""
    return int(model.config.vision_config.num_hidden_layers)


def vision_given(info: ModelInfo, given: Given) -> dict[str, Tensor] | None:
    """What the vision graph takes, by name, or None where there is no image; InputError for pixels that do not fit."""
    pixels = given.get("pixel_values")
    if pixels is None:
        return None
    if pixels.dim() != 4 or tuple(pixels.shape[1:]) != info.image_size:
        raise InputError(
            f"pixel_values has shape {tuple(pixels.shape)}; this model takes [images, "
            f"{', '.join(map(str, info.image_size))}]"
        )
    return {"pixel_values": pixels} if len(pixels) else None


def layout(info: ModelInfo, given: Given, kinds: Tensor, out: Mapping[str, Tensor] | None) -> Layout:
    """What stands at the image tokens `kinds` [P], of which the vision graph made `out` (None: as many as there are).

    Raises InputError where the images are not as many as the prompts say.
    """
    images, tokens = len(given.get("pixel_values", ())), len(kinds)
    expected = images * info.tokens_per_image
    if tokens != expected:
        raise InputError(
            f"the prompts hold {tokens} image tokens, and {images} image{'s' * (images != 1)} of "
            f"{info.tokens_per_image} tokens make {expected}: give one <image> in the text for each image"
        )
    place = torch.arange(tokens, device=kinds.device)
    number, within = place // info.tokens_per_image, place % info.tokens_per_image
    patch = torch.ones_like(place, dtype=torch.bool)
    source, count = (None, None) if out is None else (out.get("source"), out.get("count"))
    if out is None or (source is None and count is None):
        return Layout(place, _coords(info, number, within), patch)
    width = out["out"].shape[1]
    feature = number * width + within.clamp(max=max(width - 1, 0))
    stands = within if source is None or not width else source.flatten()[feature]
    gone = within >= (width if count is None else count[number])
    origin = (place - within + stands).masked_fill(stands < 0, -1)
    return Layout(feature, _coords(info, number, stands), patch, origin, gone)


def _coords(info: ModelInfo, number: Tensor, place: Tensor) -> Tensor:
    """Image, row and column of places on the grid, -1 for nowhere."""
    columns = info.grid[1]
    row, column = (each.masked_fill(place < 0, NOWHERE) for each in (place // columns, place % columns))
    return torch.stack([number, row, column], dim=1)


def sample(info: ModelInfo, images: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
    """Random images: how many tokens each becomes, and what a processor would make of them."""
    pixels = torch.randn(images, *info.image_size, generator=generator)
    return [info.tokens_per_image] * images, {"pixel_values": pixels} if images else {}


def pictures(info: ModelInfo, given: Given) -> list[Tensor]:
    """Pixels [3, height, width] of each image or tile, as the tower sees them."""
    return list(given["pixel_values"])


def positions(info: ModelInfo, given: Given, ids: Tensor, real: Tensor) -> Tensor | None:
    """Position ids of prompts, where they are not the numbers of the tokens before."""
    return None


def images_in(info: ModelInfo, given: Given, ids: Tensor) -> dict[str, list[int]]:
    """How many rows of what is given belong to each prompt of ids [B, S], by name."""
    counts = (info.visual(ids).sum(1) // info.tokens_per_image).tolist()
    return {name: counts for name, value in given.items() if len(value) == sum(counts)}
