"""LLaVA: a CLIP or SigLIP tower, an MLP projector and a decoder (`LlavaForConditionalGeneration`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.errors import UnsupportedModelError
from foveate.ir.program import ModelInfo, TowerKind
from foveate.models.decoder import check_decoder, common
from foveate.models.recording import Wrapper
from foveate.models.tiles import Tiles

DECODERS = ("llama", "mistral", "qwen2")
TOWERS: dict[str, tuple[TowerKind, str, str]] = {
    "clip_vision_model": ("patches", "default", "keeps the CLS token, which has"),
    "siglip_vision_model": ("squares", "full", "drops the first patch, without which the others have"),
}
"""Tower -> how it makes tokens, which `vision_feature_select_strategy` takes its patches, what the other one does."""


class Vision(Wrapper):
    """Pixels [I, C, height, width] to visual embeddings [I, tokens per image, hidden size]."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Tower, feature layer, projector."""
        config, inner = self.model.config, self.model.model
        hidden = inner.vision_tower(pixel_values, output_hidden_states=True).hidden_states
        layers = config.vision_feature_layer
        chosen = [hidden[i] for i in ([layers] if isinstance(layers, int) else layers)]
        if config.vision_feature_select_strategy == "default":
            chosen = [h[:, 1:] for h in chosen]
        features = inner.multi_modal_projector(chosen[0] if len(chosen) == 1 else torch.cat(chosen, dim=-1))
        assert isinstance(features, Tensor)  # the projector is a plain module
        return features


class Llava(Tiles):
    """LLaVA 1.5, with one image size; what it has in common with the LLaVAs after it."""

    vision = Vision

    def describe(self, config: Any) -> ModelInfo:
        """Sizes and names of a LLaVA with this configuration.

        Raises UnsupportedModelError for a tower, decoder or rotary embedding that is not supported.
        """
        text, vision, strategy = config.text_config, config.vision_config, config.vision_feature_select_strategy
        if vision.model_type not in TOWERS:
            raise UnsupportedModelError(
                f"vision tower {vision.model_type!r} is not supported in a LLaVA; supported: {', '.join(TOWERS)}"
            )
        check_head(vision)
        check_decoder(text, DECODERS, "a LLaVA")
        tower, wanted, what = TOWERS[vision.model_type]
        if strategy != wanted:
            raise UnsupportedModelError(
                f"vision_feature_select_strategy {strategy!r} {what} no place in the grid of visual tokens; "
                f"use {wanted!r}"
            )
        side = vision.image_size // vision.patch_size
        return ModelInfo(
            family="llava",
            **common(config),
            grid=(side, side),
            image_size=(vision.num_channels, vision.image_size, vision.image_size),
            uniform=True,
            tower=tower,
        )

    def tower_layers(self, model: Any) -> int:
        """How many tower layers the features need, at most."""
        layers = model.config.vision_feature_layer
        count = model.config.vision_config.num_hidden_layers
        deepest = max(i % (count + 1) for i in ([layers] if isinstance(layers, int) else layers))
        return int(deepest)


def check_head(vision: Any) -> None:
    """Raise UnsupportedModelError for a SigLIP tower with a pooling head."""
    if getattr(vision, "vision_use_head", False):
        raise UnsupportedModelError(
            "a SigLIP tower with a pooling head is not supported, as no LLaVA reads it: set vision_use_head=False in "
            "vision_config"
        )
