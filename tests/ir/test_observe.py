"""Observers give what eager attention of transformers gives, and change nothing else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from foveate.backends.eager import lower
from foveate.errors import TraceError
from foveate.ir.observe import OBSERVERS, distances_of, observe
from foveate.ir.rules import verify
from foveate.ir.split import split
from foveate.ir.text import parse_graphs
from foveate.model import OptimizedModel
from foveate.models.random import random_inputs
from tests.ir.programs import FFN, HEADS, LAYERS, copied, model, once, traced
from tests.oracle.masked import masked_forward
from tests.oracle.masks import Masks

PROMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"batch": 2, "prefix": 0},
    {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"},
    {"batch": 3, "padding": "right"},
    {"batch": 2, "images": 3, "text_tokens": 17},
)


@once
def observed(kv_heads: int) -> Any:
    joint, program = traced(kv_heads)
    dense = copied(program)
    dense.graphs["prefill"] = split(dense, joint)
    return observe(dense)


@contextmanager
def eager(source: Any) -> Iterator[dict[str, list[Tensor]]]:
    """Inputs of every output and down projection while the model runs with eager attention."""
    seen: dict[str, list[Tensor]] = {"o": [], "down": []}
    layers = source.model.language_model.layers
    hooks = [
        module.register_forward_pre_hook(lambda _, args, part=part: seen[part].append(args[0]))
        for layer in layers
        for part, module in (("o", layer.self_attn.o_proj), ("down", layer.mlp.down_proj))
    ]
    before = source.config._attn_implementation
    source.set_attn_implementation("eager")
    try:
        yield seen
    finally:
        source.set_attn_implementation(before)
        for hook in hooks:
            hook.remove()


def brute_force(source: Any, inputs: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The same values from the weights, head outputs and activations of the transformers model."""
    ids, real = inputs["input_ids"], inputs["attention_mask"].bool()
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with eager(source) as seen, torch.no_grad():
        out = source(**inputs, position_ids=positions, output_attentions=True, use_cache=False)
    attended = {name: list(values) for name, values in seen.items()}
    side = math.isqrt(source.config.image_seq_length)
    distances = round(math.hypot(side - 1, side - 1)) + 1
    full = masked_forward(source, inputs).logits.log_softmax(-1)
    cuts = [masked_forward(source, inputs, Masks(cut_from=layer)).logits for layer in range(len(out.attentions))]
    results = []
    for weights, outs, neurons in zip(out.attentions, attended["o"], attended["down"], strict=True):
        batch, heads = weights.shape[:2]
        found = {
            "mass": torch.zeros(batch, heads, 2, 3),
            "norms": torch.zeros(batch, heads, 2),
            "by_distance": torch.zeros(batch, heads, distances),
            "pairs": torch.zeros(batch, distances),
            "neurons": torch.zeros(batch, neurons.shape[-1]),
            "cut_kl": F.kl_div(full, cuts[len(results)].log_softmax(-1), reduction="none", log_target=True).sum(-1),
        }
        for b in range(batch):
            visual = real[b] & (ids[b] == source.config.image_token_id)
            text = real[b] & ~visual
            places = torch.arange(len(visual))
            first = int(places[visual].min()) if visual.any() else len(visual)
            groups = (text & (places < first), visual, text & (places > first))
            norms = outs[b].unflatten(-1, (heads, -1)).norm(dim=-1)
            for row, queries in enumerate((visual, text)):
                for column, keys in enumerate(groups):
                    found["mass"][b, :, row, column] = weights[b][:, queries][:, :, keys].sum((1, 2))
                if queries.any():
                    found["norms"][b, :, row] = norms[queries].mean(0)
            if visual.any():
                found["neurons"][b] = neurons[b, visual].abs().mean(0)
            tokens = places[visual].tolist()
            for i, query in enumerate(tokens):
                for j, key in enumerate(tokens[: i + 1]):
                    if i // side**2 == j // side**2:
                        (r, c), (s, d) = (divmod(x % side**2, side) for x in (i, j))
                        far = round(math.hypot(r - s, c - d))
                        found["by_distance"][b, :, far] += weights[b, :, query, key]
                        found["pairs"][b, far] += 1
        results.append(found)
    return results


@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_observers_equal_eager_attention(kv_heads: int, prompt: dict[str, Any]) -> None:
    source, program = model(kv_heads), observed(kv_heads)
    inputs = random_inputs(source, seed=3, **prompt)
    runner = OptimizedModel(traced(kv_heads)[1], source.config, source.generation_config)
    with torch.inference_mode():
        taken, _ = runner.prefill_inputs(**inputs)
        result = lower(program, program.prefill, "prefill")(taken)
        dense = runner(**inputs)
    torch.testing.assert_close(result["logits"], dense.logits, rtol=1e-5, atol=1e-5)
    for values, expected in zip(result["statistics"], brute_force(source, inputs), strict=True):
        for name, value in zip(OBSERVERS, values, strict=True):
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_an_observed_program_is_valid_and_survives_its_text() -> None:
    program = observed(2)
    verify(program)
    assert parse_graphs(program, program.to_text("prefill"))["prefill"].nodes
    sizes = [tuple(n.meta["val"].shape)[1:] for n in program.prefill.output_node().args[0]["statistics"][0]]
    far = distances_of(program.info)
    assert sizes == [(HEADS, 2, 3), (HEADS, 2), (HEADS, far), (far,), (FFN,), ()]


def test_a_graph_whose_last_layer_was_shortened_is_refused() -> None:
    with pytest.raises(TraceError, match=f"layer {LAYERS - 1} cannot be observed"):
        observe(traced(2)[1])
