"""Gemma 3: a SigLIP tower, averaged patches, and a decoder in which an image's tokens all see each other.

Most layers of the decoder see the last so many tokens only, by rotary embeddings of their own; every sixth sees all.
What a token sees is said by `foveate::attention` itself: how far forward by `reach`, how far back by `window`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.errors import UnsupportedModelError
from foveate.ir.program import ModelInfo
from foveate.models.decoder import common
from foveate.models.family import Given
from foveate.models.recording import Wrapper
from foveate.models.tiles import Tiles

KINDS = {"full_attention", "sliding_attention"}


class Vision(Wrapper):
    """Images [I, C, height, width] to visual embeddings [I, tokens per image, hidden size]."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Tower without its head, mean of each square of patches, norm, projection."""
        inner = self.model.model
        tower, projector = inner.vision_tower, inner.multi_modal_projector
        tower = getattr(tower, "vision_model", tower)  # older versions wrap it
        hidden = tower.post_layernorm(tower.encoder(inputs_embeds=tower.embeddings(pixel_values)).last_hidden_state)
        squares = (projector.tokens_per_side, projector.kernel_size) * 2
        # As pooling does it: the same mean, of values that stay where they are.
        pooled = hidden.unflatten(1, squares).mean((2, 4)).flatten(1, 2)
        features = torch.matmul(projector.mm_soft_emb_norm(pooled), projector.mm_input_projection_weight)
        assert isinstance(features, Tensor)  # the norm is a plain module
        return features


class Decoder(Wrapper):
    """Embeddings [B, S, hidden size] and positions [B, S] to logits [B, 1, V] of the token after the last.

    Layer by layer, because the model's own call makes masks of S x S, and its rotary embeddings in no certain order.
    """

    def forward(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """Decoder layers, final norm, head."""
        inner = self.model.model.language_model
        kinds = inner.config.layer_types
        angles = {kind: inner.rotary_emb(hidden, position_ids, kind) for kind in sorted(set(kinds))}
        for layer, kind in zip(inner.layers, kinds, strict=True):
            hidden = layer(hidden, position_embeddings=angles[kind], attention_mask=None, position_ids=position_ids)
        logits = self.model.lm_head(inner.norm(hidden)[:, -1:])
        assert isinstance(logits, Tensor)  # the head is a plain linear
        return logits


class Gemma3(Tiles):
    """Gemma 3, whose images are seen whole."""

    vision = Vision
    decoder = Decoder
    takes = ("pixel_values", "token_type_ids")
    """The second says which tokens are an image's, as the ids do; without it images are seen whole all the same."""
    whole_images = True

    def describe(self, config: Any) -> ModelInfo:
        """Sizes and names of a Gemma 3 with this configuration.

        Raises UnsupportedModelError for a tower, decoder or rotary embedding that is not supported, for text that is
        not causal, and for capped logits.
        """
        text, vision = config.text_config, config.vision_config
        if vision.model_type != "siglip_vision_model":
            raise UnsupportedModelError(
                f"vision tower {vision.model_type!r} is not supported in a Gemma 3; siglip_vision_model is"
            )
        if text.model_type != "gemma3_text":
            raise UnsupportedModelError(f"decoder {text.model_type!r} is not supported in a Gemma 3; gemma3_text is")
        for name in ("attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"):
            if getattr(text, name, None):
                raise UnsupportedModelError(
                    f"{name} {getattr(text, name)!r} is not supported in a Gemma 3; leave it out"
                )
        kinds = set(text.layer_types)
        if kinds - KINDS or ("sliding_attention" in kinds and not isinstance(text.sliding_window, int)):
            raise UnsupportedModelError(
                f"layers {', '.join(sorted(kinds))} with sliding_window {text.sliding_window!r} are not supported in a "
                f"Gemma 3; {' and '.join(sorted(KINDS))}, with a number of tokens, are"
            )
        patches, side = vision.image_size // vision.patch_size, int(config.mm_tokens_per_image**0.5)
        if side**2 != config.mm_tokens_per_image or patches % side:
            raise UnsupportedModelError(
                f"{patches} x {patches} patches cannot be averaged to {config.mm_tokens_per_image} tokens; they must "
                "be a square whose side divides that of the patches"
            )
        return ModelInfo(
            family="gemma3",
            **common(config),
            grid=(side, side),
            image_size=(vision.num_channels, vision.image_size, vision.image_size),
            uniform=True,
            tower="squares",
            embed_scale=text.hidden_size**0.5,
            norm_offset=1.0,
        )

    def images_in(self, info: ModelInfo, given: Given, ids: Tensor) -> dict[str, list[int]]:
        """As many as the prompt has tokens for; of the types one."""
        counts = super().images_in(info, given, ids)
        return {**counts, "token_type_ids": [1] * len(ids)} if "token_type_ids" in given else counts
