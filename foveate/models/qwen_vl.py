"""Qwen2-VL: a tower over packed patches of any grid, and a Qwen2 decoder with three-row positions (M-RoPE)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import UnsupportedModelError
from foveate.ir.program import ModelInfo
from foveate.models.decoder import PATHS, ROLES, Decoder, sizes
from foveate.models.packed import GIVEN, UNIFORM, images_in, layout, pictures, positions, sample, vision_given
from foveate.models.recording import Inputs, Size

__all__ = [
    "GIVEN",
    "POSITION_AXES",
    "UNIFORM",
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

POSITION_AXES: tuple[int, ...] = (3,)

GRID = (16, 16)
"""Visual tokens of a nominal image: 448 x 448 pixels for patches of 14 pixels, merged two by two."""


class Vision(nn.Module):
    """Packed patches [n, values of a patch] of all images to visual embeddings [n / patches per token, hidden size].

    patch_positions: int64 [n, 2], row and column of each patch in its image. cu_seqlens: int32 [images + 1], where
    each image's patches begin and end. `transformers.vision_utils` computes both from `image_grid_thw`; given from
    outside they leave one graph for every grid.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, patch_positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Tower and merger."""
        # The longest segment is for flash kernels alone, which the recording does not call.
        given = {"position_ids": patch_positions, "cu_seqlens": cu_seqlens, "max_seqlen": 1}
        features = self.model.model.visual(pixel_values, grid_thw=None, **given).pooler_output
        assert isinstance(features, Tensor)  # the merger is a plain module
        return features


def vision_inputs(info: ModelInfo, size: Size) -> Inputs:
    """Inputs of `Vision`."""
    vision = info.config["vision_config"]
    patch = vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2
    return {
        "pixel_values": ((size("patches"), patch), None),
        "patch_positions": ((size("patches"), 2), torch.int64),
        "cu_seqlens": ((size("images") + 1,), torch.int32),
    }


def describe(config: Any) -> ModelInfo:
    """Sizes and names of a Qwen2-VL with this configuration.

    Raises UnsupportedModelError for patches that are not square, sliding windows, or a rotary embedding that is not
    supported.
    """
    text, vision = config.text_config, config.vision_config
    for name in ("patch_size", "temporal_patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise UnsupportedModelError(f"{name} {getattr(vision, name)!r} is not supported; one number is")
    if text.sliding_window is not None:
        raise UnsupportedModelError(
            f"sliding window attention ({text.sliding_window} tokens) is not supported; use_sliding_window=False is"
        )
    merged = vision.spatial_merge_size
    height, width = (count * merged * vision.patch_size for count in GRID)
    return ModelInfo(
        family="qwen2_vl",
        **sizes(text),
        image_token_id=config.image_token_id,
        grid=GRID,
        image_size=(vision.in_channels, height, width),
        paths=dict(PATHS),
        roles=dict(ROLES),
        config=config.to_dict(),
        patches_per_token=merged**2,
        video_token_id=config.video_token_id,
    )


def tower_layers(model: Any) -> int:
    """How many tower layers the features need."""
    return int(model.config.vision_config.depth)
