"""Qwen2-VL: a tower over packed patches of any grid, and a Qwen2 decoder with three-row positions (M-RoPE)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.ir.program import ModelInfo
from foveate.models.packed import Packed, about
from foveate.models.recording import Wrapper


class Vision(Wrapper):
    """Packed patches [n, values of a patch] of all images to visual embeddings [n / patches per token, hidden size].

    patch_positions: int64 [n, 2], row and column of each patch in its image. cu_seqlens: int32 [images + 1], where
    each image's patches begin and end. `transformers.vision_utils` computes both from `image_grid_thw`; given from
    outside they leave one graph for every grid.
    """

    def forward(self, pixel_values: Tensor, patch_positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Tower and merger."""
        # The longest segment is for flash kernels alone, which the recording does not call.
        given = {"position_ids": patch_positions, "cu_seqlens": cu_seqlens, "max_seqlen": 1}
        features = self.model.model.visual(pixel_values, grid_thw=None, **given).pooler_output
        assert isinstance(features, Tensor)  # the merger is a plain module
        return features


class Qwen2VL(Packed):
    """Qwen2-VL, as all of its kind."""

    vision = Vision

    def describe(self, config: Any) -> ModelInfo:
        """Sizes and names of a Qwen2-VL with this configuration.

        Raises UnsupportedModelError for patches that are not square, sliding windows, or a rotary embedding that is
        not supported.
        """
        return about(config, family="qwen2_vl")
