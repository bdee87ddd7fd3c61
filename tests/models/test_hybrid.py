"""Hybrid decoders are refused: the op by which linear attention mixes tokens is named, with its layer and module."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import Tensor

import foveate
from foveate.errors import TraceError, UnsupportedModelError
from foveate.ir.program import ModelInfo
from foveate.models import packed, qwen3_vl
from foveate.models.decoder import Decoder
from foveate.models.recording import Wrapper
from foveate.models.registry import FAMILIES
from tests.models.tiny import HIDDEN, TEXT, VOCAB, build

configuration = pytest.importorskip("transformers.models.qwen3_5.configuration_qwen3_5")


def qwen3_5(*kinds: str) -> Any:
    """A Qwen3.5 without weights; kinds: those of its layers."""
    heads = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "head_dim": 8}
    text = {**TEXT, **heads, "linear_num_value_heads": 4, "layer_types": [f"{kind}_attention" for kind in kinds]}
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1000.0, "partial_rotary_factor": 1.0}
    tower = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": HIDDEN}
    config = configuration.Qwen3_5Config(
        text_config={**text, "num_hidden_layers": len(kinds), "rope_parameters": rope},
        vision_config={**tower, "patch_size": 8, "num_position_embeddings": 36, "deepstack_visual_indexes": []},
        image_token_id=VOCAB - 1,
        video_token_id=VOCAB - 2,
    )
    return build(config, "meta")


class Layers(Wrapper):
    """Layer by layer, as Qwen3-VL's."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.rotary_emb = qwen3_vl._Rotary(1)

    def forward(self, hidden: Tensor, position_ids: Tensor) -> Any:
        inner = self.model.model.language_model
        given = inner.rotary_emb.inv_freq, inner.rotary_emb.attention_scaling, hidden.dtype
        angles = self.rotary_emb(position_ids, *given)
        for layer in inner.layers:
            hidden = layer(hidden, position_embeddings=angles)
        return self.model.lm_head(inner.norm(hidden)[:, -1:])


class Hybrid(qwen3_vl.Qwen3VL):
    """The family as a user may add it."""

    decoder = Layers

    def describe(self, config: Any) -> ModelInfo:
        return packed.about(config, family="qwen3_5")


def test_a_hybrid_family_is_not_known() -> None:
    with pytest.raises(UnsupportedModelError, match="model family 'qwen3_5' is not supported; supported: llava"):
        foveate.trace(qwen3_5("linear"))


@pytest.mark.slow
@pytest.mark.parametrize(("kinds", "layer"), [(["linear", "full"], 0), (["full", "linear"], 1)])
def test_one_that_is_added_is_refused_with_the_op_that_mixes_tokens(
    kinds: list[str], layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, "qwen3_5", Hybrid())
    with pytest.raises(TraceError) as caught:
        foveate.trace(qwen3_5(*kinds))
    # The number behind the node's name is torch's.
    assert re.sub(r"conv1d(_\d+)?:", "conv1d:", str(caught.value)) == (
        f"layer {layer}, linear_attn, node l{layer}_conv1d: aten.conv1d.default is not known to keep tokens apart"
    )


def test_without_its_linear_layers_it_would_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it is they that are refused."""
    monkeypatch.setitem(FAMILIES, "qwen3_5", Hybrid())
    assert foveate.trace(qwen3_5("full", "full")).info.layers == 2


@pytest.mark.slow
def test_other_ops_that_cannot_be_split_are_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called as a whole, the decoder writes rotary angles into slices, before its first layer."""
    monkeypatch.setattr(Hybrid, "decoder", Decoder)
    monkeypatch.setitem(FAMILIES, "qwen3_5", Hybrid())
    with pytest.raises(TraceError, match=r"^layer -1, rotary_emb, node pre_copy_.*: aten.copy_.default is not known"):
        foveate.trace(qwen3_5("linear"))
