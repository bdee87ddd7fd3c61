"""What transformers makes of images that are cut into tiles: which of their tokens are newlines, which are patches."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def tiles_of(model: Any, size: Sequence[int]) -> int:
    """How many tiles an image of this height and width is cut into."""
    count: int = sys.modules[type(model).__module__].image_size_to_num_patches(
        list(size), model.config.image_grid_pinpoints, model.config.vision_config.image_size
    )
    return count


def packed(model: Any, values: Tensor, size: Sequence[int], newline: Tensor, aspect: str = "") -> Tensor:
    """What stands at an image's tokens [n, k], for values of its tiles' patches [T, N, k] and of a newline [k].

    aspect: another `vision_aspect_ratio` than the model's, where it has one.
    """
    options: dict[str, Any] = {"vision_feature_select_strategy": model.config.vision_feature_select_strategy}
    if hasattr(model.config, "vision_aspect_ratio"):
        options = {"vision_aspect_ratio": aspect or model.config.vision_aspect_ratio}
    sizes = torch.tensor([list(size)])
    (found,), _ = model.model.pack_image_features([values], sizes, image_newline=newline, **options)
    assert isinstance(found, Tensor)
    return found


def newlines(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Where newlines stand: bool [B, S]."""
    ids = inputs["input_ids"]
    found = torch.zeros_like(ids, dtype=torch.bool)
    if not hasattr(model.model, "image_newline"):
        return found
    vision = model.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    if inputs.get("image_sizes") is not None:
        sizes, groups = inputs["image_sizes"].tolist(), inputs.get("batch_num_images")
        alone = [True] * len(sizes) if groups is None else [n == 1 for n in groups.tolist() for _ in range(n)]
        counts = [tiles_of(model, size) if cut else 1 for size, cut in zip(sizes, alone, strict=True)]
        marks = [
            packed(model, torch.zeros(tiles, patches, 1), size, torch.ones(1))[:, 0]
            for size, tiles in zip(sizes, counts, strict=True)
        ]
        found = found.masked_scatter(ids == model.config.image_token_id, torch.cat(marks).bool())
    if inputs.get("pixel_values_videos") is not None:
        videos, frames = inputs["pixel_values_videos"].shape[:2]
        pooled = model.model.apply_pooling(torch.zeros(frames, patches, 1)).flatten()
        mark = torch.cat([pooled, torch.ones(1)]).repeat(videos)
        found = found.masked_scatter(ids == model.config.video_token_id, mark.bool())
    return found
