"""The oracle beside a decoder that really leaves the work out, token by token and head by head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from foveate.models.random import random_inputs
from tests.oracle.conftest import FFN, HEADS, assert_near, dense, random_mask, small
from tests.oracle.masked import masked_forward
from tests.oracle.masks import Masks, Prune


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("seed", range(6))
def test_everything_at_once_equals_a_decoder_without_the_work(kv_heads: int, seed: int) -> None:
    model = small(kv_heads=kv_heads, layers=4, seed=seed)
    inputs = random_inputs(model, images=2, seed=seed, prefix=seed % 3)
    masks = Masks(
        cut_from=(4, 3, 2, None)[seed % 4],
        heads=random_mask(4, HEADS, seed=seed) if seed != 1 else None,
        neurons=random_mask(4, FFN, seed=seed) if seed != 2 else None,
        prunes=(Prune(1, 0.8, "fastv"), Prune(2, 0.7, "fastv"))[: seed % 3],
    )
    logits, kept = by_hand(model, inputs, masks)
    output = masked_forward(model, inputs, masks)
    assert_near(output.logits[0], logits)
    assert [k[0].nonzero().squeeze(1).tolist() for k in output.kept] == kept
    assert (output.logits - dense(model, inputs)).abs().max() > 1e-2


def test_one_layer_with_dropped_heads_by_hand() -> None:
    model = small(layers=1, kv_heads=4)
    inputs = random_inputs(model)
    masks = Masks(heads=torch.tensor([[True, False, False, True]]))
    logits = masked_forward(model, inputs, masks).logits
    assert_near(logits[0], by_hand(model, inputs, masks)[0])
    assert (logits - dense(model, inputs)).abs().max() > 1e-2


@torch.no_grad()
def by_hand(model: Any, inputs: dict[str, Tensor], masks: Masks) -> tuple[Tensor, list[list[int]]]:
    """One unpadded row with the work really left out, token by token and head by head.

    Returns the last logits [V] and, for each prune, the places of the tokens that stay.
    """
    ids = inputs["input_ids"][0]
    features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    is_visual = (ids == model.config.image_token_id).tolist()
    rows = list(model.get_input_embeddings()(ids))
    for place, feature in zip((ids == model.config.image_token_id).nonzero(), features, strict=True):
        rows[int(place)] = feature
    stream = dict(enumerate(rows))  # place -> hidden state [D]; a token that is gone is not in it
    decoder = model.model.language_model
    row_of_last: dict[int, float] = {}
    kept: list[list[int]] = []
    for index, layer in enumerate(decoder.layers):
        for prune in masks.prunes:
            if prune.layer == index:
                alive = [p for p in stream if is_visual[p]]
                ranked = sorted(alive, key=lambda p: (-row_of_last.get(p, 0.0), p))
                kept.append(sorted(ranked[: math.floor(prune.keep * len(alive))]))
                stream = {p: h for p, h in stream.items() if not is_visual[p] or p in kept[-1]}
        if index == masks.cut_from:
            stream = {p: h for p, h in stream.items() if not is_visual[p]}
        attended, row_of_last = attend_by_hand(decoder, layer, stream, is_visual, masks, index)
        stream = {p: feed_by_hand(layer, h, is_visual[p], masks, index) for p, h in attended.items()}
    logits: Tensor = model.lm_head(decoder.norm(stream[len(ids) - 1]))
    return logits, kept


def attend_by_hand(
    decoder: Any, layer: Any, stream: dict[int, Tensor], is_visual: list[bool], masks: Masks, index: int
) -> tuple[dict[int, Tensor], dict[int, float]]:
    """The stream after attention, and the head mean of the last token's weights by place."""
    attention = layer.self_attn
    size = attention.head_dim
    group = attention.num_key_value_groups
    normed = {p: layer.input_layernorm(h) for p, h in stream.items()}
    queries, keys = (
        {p: rotated(decoder, project(h).view(-1, size), p) for p, h in normed.items()}
        for project in (attention.q_proj, attention.k_proj)
    )
    values = {p: attention.v_proj(h).view(-1, size) for p, h in normed.items()}
    result, row_of_last = {}, dict.fromkeys(stream, 0.0)
    for place in stream:
        outputs = []
        for head in range(HEADS):
            visual_too = masks.heads is None or bool(masks.heads[index, head])
            if is_visual[place] and not visual_too:
                outputs.append(torch.zeros(size))
                continue
            seen = [p for p in stream if p <= place and (visual_too or not is_visual[p])]
            scores = [queries[place][head] @ keys[p][head // group] / math.sqrt(size) for p in seen]
            weights = torch.stack(scores).softmax(0)
            outputs.append(sum(w * values[p][head // group] for w, p in zip(weights, seen, strict=True)))
            if place == max(stream):
                for weight, p in zip(weights, seen, strict=True):
                    row_of_last[p] += float(weight) / HEADS
        result[place] = stream[place] + attention.o_proj(torch.cat(outputs))
    return result, row_of_last


def rotated(decoder: Any, vectors: Tensor, place: int) -> Tensor:
    """Rotary embedding of [heads, E] at one position."""
    angles = place * decoder.rotary_emb.inv_freq
    first, second = vectors.chunk(2, dim=-1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def feed_by_hand(layer: Any, hidden: Tensor, on_visual: bool, masks: Masks, index: int) -> Tensor:
    mlp, normed = layer.mlp, layer.post_attention_layernorm(hidden)
    keep = masks.neurons[index] if on_visual and masks.neurons is not None else torch.ones(FFN).bool()
    inner = silu(mlp.gate_proj.weight[keep] @ normed) * (mlp.up_proj.weight[keep] @ normed)
    output: Tensor = hidden + mlp.down_proj.weight[:, keep] @ inner
    return output
