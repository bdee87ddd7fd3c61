"""What the decoders of all families have in common: how they are called, what is refused, where their weights are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.errors import UnsupportedModelError
from foveate.models.recording import Inputs, Size, Wrapper
from foveate.models.rotary import position_limit

PATHS = {
    "embed": "model.language_model.embed_tokens.weight",
    "head": "lm_head.weight",
    "layers": "model.language_model.layers",
    "norm": "model.language_model.norm.weight",
}

ROLES = {
    **{letter: f"self_attn.{letter}_proj" for letter in "qkvo"},
    **{name: f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}
"""The linears of a layer that holds each of them in a weight of its own."""

FUSED_ROLES = {
    **{letter: f"self_attn.qkv_proj[{i}]" for i, letter in enumerate("qkv")},
    "o": "self_attn.o_proj",
    **{name: f"mlp.gate_up_proj[{i}]" for i, name in enumerate(("gate", "up"))},
    "down": "mlp.down_proj",
}
"""The same where one weight holds q, k and v, and one holds gate and up; see `foveate.ir.canonical.unfuse`."""


class Decoder(Wrapper):
    """Embeddings [B, S, hidden size] and positions [..., B, S] to logits [B, 1, V] of the token after the last.

    inside: what the model calls its decoder.
    """

    inside = "language_model"

    def forward(self, hidden: Tensor, position_ids: Tensor) -> Tensor:
        """Decoder layers, final norm, head."""
        layers = getattr(self.model.model, self.inside)
        states = layers(inputs_embeds=hidden, position_ids=position_ids, use_cache=False).last_hidden_state
        logits = self.model.lm_head(states[:, -1:])
        assert isinstance(logits, Tensor)  # the head is a plain linear
        return logits


def check_decoder(text: Any, decoders: Collection[str], model: str) -> None:
    """Raise UnsupportedModelError for a decoder that is none of these, or has sliding windows; model: of what kind."""
    if text.model_type not in decoders:
        raise UnsupportedModelError(
            f"decoder {text.model_type!r} is not supported in {model}; supported: {', '.join(decoders)}"
        )
    if getattr(text, "sliding_window", None) is not None:
        raise UnsupportedModelError(f"sliding window attention ({text.sliding_window} tokens) is not supported")


def common(config: Any, roles: Mapping[str, str] = ROLES, paths: Mapping[str, str] = PATHS) -> dict[str, Any]:
    """What `ModelInfo` has in common for all models with such a configuration: sizes of the decoder, names of weights.

    Raises UnsupportedModelError for rotary embeddings that are not supported: see `position_limit`.
    """
    text = config.text_config
    return {
        "layers": text.num_hidden_layers,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "image_token_id": config.image_token_id,
        "position_limit": position_limit(text),
        "paths": dict(paths),
        "roles": dict(roles),
        "config": config.to_dict(),
    }


def decoder_inputs(hidden_size: int, axes: tuple[int, ...], size: Size, deepstack: int = 0) -> Inputs:
    """Inputs of `Decoder`; axes: those of the position ids before [batch, sequence]; deepstack: levels, if any."""
    tokens = (size("batch"), size("sequence"))
    levels: Inputs = {"deepstack": ((*tokens, deepstack, hidden_size), None)} if deepstack else {}
    return {"hidden": ((*tokens, hidden_size), None), "position_ids": ((*axes, *tokens), torch.int64), **levels}
