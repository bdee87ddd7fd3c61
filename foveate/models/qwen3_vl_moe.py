"""Qwen3-VL with experts: Qwen3-VL, where each token goes through a few of many small feed-forward layers.

    logits = gate(x);  y = experts(x, the 8 of 128 with the largest logits)      one op for all: `foveate::experts`

Transformers folds the batch and its tokens into one axis there, so its block is written out for the recording.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

from torch import Tensor
from torch.nn import functional

from foveate import ops
from foveate.errors import UnsupportedModelError
from foveate.ir.program import ModelInfo
from foveate.models.qwen3_vl import Decoder, Qwen3VL


class MoeDecoder(Decoder):
    """As for Qwen3-VL."""

    def forward(self, hidden: Tensor, position_ids: Tensor, deepstack: Tensor | None = None) -> Tensor:
        """As for Qwen3-VL."""
        from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

        activation = self.model.config.text_config.hidden_act

        def block(own: Any, x: Tensor) -> Tensor:
            logits, held = functional.linear(x, own.gate.weight), own.experts
            out: Tensor = ops.experts(x, logits, held.gate_up_proj, held.down_proj, own.gate.top_k, activation)
            return out

        with mock.patch.object(Qwen3VLMoeTextSparseMoeBlock, "forward", block):
            return super().forward(hidden, position_ids, deepstack)


class Qwen3VLMoe(Qwen3VL):
    """Qwen3-VL with experts; layers that have none (`mlp_only_layers`) are those of Qwen3-VL."""

    decoder = MoeDecoder

    def describe(self, config: Any) -> ModelInfo:
        """As for Qwen3-VL, where a layer has as many neurons as a token uses of it.

        Raises UnsupportedModelError for an activation that `foveate::experts` does not have.
        """
        text = config.text_config
        if text.hidden_act not in ops.ACTIVATIONS:
            raise UnsupportedModelError(
                f"hidden_act {text.hidden_act!r} is not supported in experts; {', '.join(ops.ACTIVATIONS)} are"
            )
        used = text.num_experts_per_tok * text.moe_intermediate_size
        return replace(super().describe(config), family="qwen3_vl_moe", intermediate_size=used)
