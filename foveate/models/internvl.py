"""InternVL: an InternViT tower over tiles, pixel unshuffling, an MLP; a Llama, Qwen2, Qwen3 or Phi-3 decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.errors import UnsupportedModelError
from foveate.ir.program import ModelInfo
from foveate.models.decoder import FUSED_ROLES, ROLES, check_decoder, common
from foveate.models.recording import Wrapper
from foveate.models.tiles import Tiles

DECODERS = {"llama": ROLES, "phi3": FUSED_ROLES, "qwen2": ROLES, "qwen3": ROLES}
"""Decoders that are known, and what each calls its linears."""


class Vision(Wrapper):
    """Tiles [I, C, height, width] to visual embeddings [I, tokens per tile, hidden size]; a tile counts as an image."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Tower, pixel unshuffling, projector."""
        features = self.model.model.get_image_features(pixel_values, return_dict=True).pooler_output
        assert isinstance(features, Tensor)  # the projector is a plain module
        return features


class InternVL(Tiles):
    """InternVL, whose tiles count as images."""

    vision = Vision

    def describe(self, config: Any) -> ModelInfo:
        """Sizes and names of an InternVL with this configuration.

        Raises UnsupportedModelError for a tower, decoder, feature layer or rotary embedding that is not supported.
        """
        text, vision = config.text_config, config.vision_config
        if vision.model_type != "internvl_vision":
            raise UnsupportedModelError(
                f"vision tower {vision.model_type!r} is not supported in an InternVL; internvl_vision is"
            )
        check_decoder(text, DECODERS, "an InternVL")
        if config.vision_feature_layer != -1 or config.vision_feature_select_strategy != "default":
            raise UnsupportedModelError(
                f"vision_feature_layer {config.vision_feature_layer!r} with vision_feature_select_strategy"
                f" {config.vision_feature_select_strategy!r} is not supported; -1 with 'default' is"
            )
        (height, width), (patch_height, patch_width) = vision.image_size, vision.patch_size
        rows, columns = height // patch_height, width // patch_width
        if rows != columns or rows * config.downsample_ratio % 1:
            raise UnsupportedModelError(
                f"a tile of {rows} x {columns} patches cannot be unshuffled by {config.downsample_ratio}; it must be"
                " square and divisible"
            )
        side = int(rows * config.downsample_ratio)
        return ModelInfo(
            family="internvl",
            **common(config, DECODERS[text.model_type]),
            grid=(side, side),
            image_size=(vision.num_channels, height, width),
            uniform=True,
            tower="squares",
        )
