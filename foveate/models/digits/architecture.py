"""The model's sizes: a small LLaVA with every part that a large one has."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from foveate.models.digits.data import SIZE
from foveate.models.digits.processing import PATCH, VISUAL_TOKENS

TOWER_LAYERS = 5
DECODER_LAYERS = 10

LIKENESS_FROM = 4
"""The first decoder layer (from 0) whose keys start equal to its queries."""

_READING = {"embed_tokens", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
"""Weights that read the residual stream, and the embeddings; what writes to it keeps the small deviation."""

_GAIN = 3.5


def build_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """CLIP tower 5 x 128 (its last layer unused, as in LLaVA 1.5), MLP projector, Llama 10 x 192."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=TOWER_LAYERS,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=DECODER_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A freshly initialised model; seed torch's generator first."""
    model = LlavaForConditionalGeneration(build_config(tokenizer))
    # Llama draws weights with a deviation of 0.02, which suits a width of 2,048 (1 / sqrt(2048) = 0.022).
    # At a width of 192 it leaves attention almost flat, and training starts slowly.
    with torch.no_grad():
        for name, weight in model.model.language_model.named_parameters():
            if name.split(".")[-2] in _READING:
                weight.mul_(_GAIN)
        # The upper layers start by attending to tokens that look alike; see the place loss in `instruct`.
        for layer in model.model.language_model.layers[LIKENESS_FROM:]:
            layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
    return model
