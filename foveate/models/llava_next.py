"""LLaVA-NeXT: a CLIP tower over tiles of any image, an MLP projector, and a Llama, Mistral or Qwen2 decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.errors import UnsupportedModelError
from foveate.ir.layout import Layout
from foveate.ir.program import ModelInfo
from foveate.models import anyres
from foveate.models.decoder import check_decoder, common
from foveate.models.family import Given
from foveate.models.llava import DECODERS, Llava


class LlavaNext(Llava):
    """LLaVA-NeXT, whose tiles count as images."""

    vision = anyres.Vision
    takes = ("pixel_values", "image_sizes")

    def describe(self, config: Any) -> ModelInfo:
        """Sizes and names of a LLaVA-NeXT with this configuration; a tile counts as an image.

        Raises UnsupportedModelError for a tower, decoder, rotary embedding or image sizes that are not supported.
        """
        text, vision = config.text_config, config.vision_config
        if vision.model_type != "clip_vision_model":
            raise UnsupportedModelError(
                f"vision tower {vision.model_type!r} is not supported in a LLaVA-NeXT; a CLIP tower "
                "(clip_vision_model) is"
            )
        check_decoder(text, DECODERS, "a LLaVA-NeXT")
        if config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} keeps the CLS token, which "
                "has no place in the grid of visual tokens; use 'default'"
            )
        anyres.check_pinpoints(config, vision.image_size)
        side = vision.image_size // vision.patch_size
        return ModelInfo(
            family="llava_next",
            **common(config),
            grid=(side, side),
            image_size=(vision.num_channels, vision.image_size, vision.image_size),
            uniform=False,
            tower="interleaved",
        )

    def vision_given(self, info: ModelInfo, given: Given) -> dict[str, Tensor] | None:
        """The tiles of all images."""
        sizes = anyres.sizes_of(given)
        if not given.keys() & set(self.takes):
            return None
        tiles = anyres.tiles_of(info, given["pixel_values"], [anyres.tile_count(info, size) for size in sizes])
        return {"pixel_values": tiles} if len(tiles) else None

    def layout(self, info: ModelInfo, given: Given, kinds: Tensor, out: Given | None) -> Layout:
        """The whole of an image, then its tiles with newlines; every tile has a grid of its own.

        A selection leaves patches where they are, and newlines all.
        """
        numbers, tiles = [torch.zeros(0, dtype=torch.int64)], 0
        for size in anyres.sizes_of(given):
            mine = anyres.image_numbers(info, size)
            numbers.append(torch.where(mine == anyres.NEWLINE, mine, mine + tiles * info.tokens_per_image))
            tiles += anyres.tile_count(info, size)
        found = torch.cat(numbers).to(kinds.device)
        anyres.check_count("image", len(kinds), len(found))
        return anyres.patches(info, found, tiles, None if out is None else out.get("source"))

    def sample(self, info: ModelInfo, images: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        """Noise of random sizes."""
        sizes = anyres.sample_sizes(info, images, generator)
        tokens = [len(anyres.image_numbers(info, size)) for size in sizes.tolist()]
        return tokens, anyres.sample_given(info, sizes, generator) if images else {}

    def pictures(self, info: ModelInfo, given: Given) -> list[Tensor]:
        """Each tile."""
        found = self.vision_given(info, given)
        return [] if found is None else list(found["pixel_values"])

    def images_in(self, info: ModelInfo, given: Given, ids: Tensor) -> dict[str, list[int]]:
        """By the tokens that each image makes."""
        sizes = anyres.sizes_of(given)
        images = anyres.counts_in(ids, info.image_token_id, [len(anyres.image_numbers(info, size)) for size in sizes])
        tiles = anyres.sums([anyres.tile_count(info, size) for size in sizes], images)
        padded = "pixel_values" in given and given["pixel_values"].dim() == 5
        counts = {"image_sizes": images, "pixel_values": images if padded else tiles}
        return {name: each for name, each in counts.items() if name in given and len(given[name]) == sum(each)}
