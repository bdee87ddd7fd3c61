"""Families whose images, or tiles of images, all have one size and become equally many tokens."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.ir.layout import NOWHERE, Layout
from foveate.ir.program import ModelInfo
from foveate.models.family import Family, Given
from foveate.models.recording import Inputs, Size


class Tiles(Family):
    """A family with pixels [images, channels, height, width]; what a subclass has to add is `vision` and `describe`."""

    takes: ClassVar[tuple[str, ...]] = ("pixel_values",)

    def vision_inputs(self, info: ModelInfo, size: Size) -> Inputs:
        """The pixels alone."""
        return {"pixel_values": ((size("images"), *info.image_size), None)}

    def tower_layers(self, model: Any) -> int:
        """All, where the features come from the last."""
        return int(model.config.vision_config.num_hidden_layers)

    def vision_given(self, info: ModelInfo, given: Given) -> dict[str, Tensor] | None:
        """The pixels as they are; InputError for those of another size."""
        pixels = given.get("pixel_values")
        if pixels is None:
            return None
        if pixels.dim() != 4 or tuple(pixels.shape[1:]) != info.image_size:
            raise InputError(
                f"pixel_values has shape {tuple(pixels.shape)}; this model takes [images, "
                f"{', '.join(map(str, info.image_size))}]"
            )
        return {"pixel_values": pixels} if len(pixels) else None

    def layout(self, info: ModelInfo, given: Given, kinds: Tensor, out: Given | None) -> Layout:
        """Image by image, row by row; `source` and `count` of `out` say which tokens a selection left."""
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

    def images_in(self, info: ModelInfo, given: Given, ids: Tensor) -> dict[str, list[int]]:
        """As many as the prompt has tokens for."""
        counts = (info.visual(ids).sum(1) // info.tokens_per_image).tolist()
        return {name: counts for name, value in given.items() if len(value) == sum(counts)}

    def pictures(self, info: ModelInfo, given: Given) -> list[Tensor]:
        """Each image or tile."""
        return list(given["pixel_values"])

    def sample(self, info: ModelInfo, images: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        """Noise."""
        pixels = torch.randn(images, *info.image_size, generator=generator)
        return [info.tokens_per_image] * images, {"pixel_values": pixels} if images else {}


def _coords(info: ModelInfo, number: Tensor, place: Tensor) -> Tensor:
    """Image, row and column of places on the grid, -1 for nowhere."""
    columns = info.grid[1]
    row, column = (each.masked_fill(place < 0, NOWHERE) for each in (place // columns, place % columns))
    return torch.stack([number, row, column], dim=1)
