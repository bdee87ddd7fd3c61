"""InternVL: the traced graphs are the model for each decoder, and fused weights behave like separate ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from foveate import ops
from foveate.errors import UnsupportedModelError
from foveate.ir.cost import cost_of
from foveate.ir.program import Program, info
from foveate.ir.rewriter import nodes_of
from foveate.ir.weights import read_weight, weight_name
from foveate.models.registry import trace_program
from foveate.passes.pipeline import apply_pipeline
from tests.ir.programs import once
from tests.models import decoders
from tests.models.decoders import PIPELINES, prompt
from tests.models.tiny import FFN, HIDDEN, LAYERS, internvl, random, run

aten = torch.ops.aten
DECODERS = ("llama", "qwen2", "qwen3", "phi3")
each = pytest.mark.parametrize("decoder", DECODERS)


@once
def traced(decoder: str) -> tuple[Any, fx.Graph, Program]:
    """A model, its joint decoder and its program; nobody may change them."""
    source = internvl(decoder)
    return source, *decoders.traced(source)


@each
def test_the_joint_graph_is_the_transformers_decoder(decoder: str) -> None:
    source, joint, program = traced(decoder)
    found = [n for n in joint.nodes if n.target == ops.attention]
    assert [info(n).layer for n in found] == list(range(LAYERS))
    decoders.check_joint(source, program, joint, prompt(visual=8))


@each
@pytest.mark.parametrize("prefix", [2, -1])
def test_the_split_prefill_and_a_decode_step_are_the_transformers_decoder(decoder: str, prefix: int) -> None:
    source, _, program = traced(decoder)
    decoders.check_split(source, program, prompt(visual=8, prefix=prefix))


@pytest.mark.slow
@each
def test_text_form_join_and_meta(decoder: str) -> None:
    source, joint, program = traced(decoder)
    decoders.check_forms(program, joint)
    assert trace_program(internvl(decoder, "meta")).to_text() == program.to_text()
    assert source.config.text_config._attn_implementation == "sdpa"


VISION = {
    "small": {},
    "large": {"attention_bias": False, "use_qk_norm": True, "norm_type": "rms_norm"},
    "biased": {"attention_bias": True, "image_size": 48, "use_mean_pooling": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", VISION)
@pytest.mark.parametrize("tiles", [1, 3])
def test_the_vision_graph_is_the_transformers_tower_and_projector(kind: str, tiles: int) -> None:
    source, program = tower(kind)
    side = source.config.vision_config.image_size[0]
    pixels = random(tiles, 3, side, side)
    with torch.no_grad():
        expected = source.get_image_features(pixels, return_dict=True).pooler_output
    actual = run(program, program.graphs["vision"], {"pixel_values": pixels})["out"]
    assert actual.shape == (tiles, program.info.tokens_per_image, HIDDEN)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@once
def tower(kind: str) -> tuple[Any, Program]:
    source = internvl("llama", vision=VISION[kind])
    return source, decoders.traced(source)[1]


@each
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_passes_apply_and_save_prefill_work(decoder: str, pipeline: str) -> None:
    _, _, program = traced(decoder)
    pruned = apply_pipeline(program.copy(), pipeline)
    dense, less = (cost_of(p, visual_tokens=64, text_tokens=8) for p in (program, pruned))
    assert less.prefill.flops < dense.prefill.flops
    assert less.vision.flops == dense.vision.flops > 0


# --- fused weights --------------------------------------------------------------------------------------


@once
def separate() -> Program:
    """A Llama decoder that holds the rows of the Phi-3's fused weights in weights of their own."""
    source = traced("phi3")[0]
    made = internvl("llama", rms_norm_eps=source.config.text_config.rms_norm_eps)
    state = source.state_dict()
    for name in [n for n in state if "qkv_proj" in n or "gate_up_proj" in n]:
        fused = state.pop(name)
        parts = {"q": 32, "k": 16, "v": 16} if "qkv" in name else {"gate": FFN, "up": FFN}
        old = "qkv_proj" if "qkv" in name else "gate_up_proj"
        for part, rows in zip(parts, fused.split(list(parts.values())), strict=True):
            state[name.replace(old, f"{part}_proj")] = rows
    made.load_state_dict(state)
    return decoders.traced(made)[1]


def test_fused_weights_are_read_in_parts_that_know_their_roles() -> None:
    _, _, program = traced("phi3")
    roles = program.info.roles
    whole = {"q": 32, "k": 16, "v": 16, "gate": FFN, "up": FFN}
    for part, rows in whole.items():
        found = nodes_of(program.prefill, role=roles[part], stream="text", layer=1, op=aten.linear.default)
        assert [read_weight(program, n).shape for n in found] == [(rows, HIDDEN)]
        assert weight_name(found[0]).endswith("qkv_proj.weight" if part in "qkv" else "gate_up_proj.weight")
    decoder = [n for n in program.weights.names if "language_model" in n]
    assert not [n for n in decoder if "q_proj" in n or ".gate_proj" in n], "nothing is copied"


@pytest.mark.parametrize("pipeline", ["", *PIPELINES])
def test_a_pruned_fused_decoder_is_the_pruned_decoder_with_separate_weights(pipeline: str) -> None:
    mine, other = (apply_pipeline(p.copy(), pipeline) for p in (traced("phi3")[2], separate()))
    for prefix in (2, -1):
        decoders.check_same(mine, prompt(visual=8, prefix=prefix), other, prompt(visual=8, prefix=prefix))
    sizes = {"visual_tokens": 64, "text_tokens": 8}
    assert cost_of(mine, **sizes).prefill.flops == cost_of(other, **sizes).prefill.flops


def test_reordering_a_part_of_a_fused_weight_leaves_the_model_and_the_dense_function_as_they_were() -> None:
    source, _, program = traced("phi3")
    before = {name: value.clone() for name, value in source.state_dict().items()}
    pruned = apply_pipeline(program.copy(), "drop-visual-heads{keep=3,from_layer=0},drop-visual-neurons{select=random}")
    name = "model.language_model.layers.1.mlp.gate_up_proj.weight"
    assert not torch.equal(pruned.weights.get(name), before[name])
    assert torch.equal(pruned.weights.get(name).sort(0).values, before[name].sort(0).values)
    assert all(torch.equal(value, before[key]) for key, value in source.state_dict().items())
    # Text alone runs through every head and neuron, in whatever order they stand.
    words = prompt(visual=0, text=9)
    decoders.check_same(pruned, words, program, words)


# --- what is not supported ------------------------------------------------------------------------------


def with_config(**changes: Any) -> Any:
    source = internvl("llama", "meta")
    for name, value in changes.items():
        setattr(source.config, name, value)
    return source


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: internvl("mistral", "meta"), r"decoder 'mistral' is not supported in an InternVL; .* llama, phi3, q"),
        (lambda: internvl("phi3", "meta", sliding_window=8), r"sliding window attention \(8 tokens\)"),
        (lambda: with_config(vision_feature_layer=-2), r"vision_feature_layer -2 with .* -1 with 'default' is"),
        (lambda: with_config(vision_feature_select_strategy="full"), r"select_strategy 'full' is not supported"),
        (lambda: internvl("llama", "meta", vision={"image_size": 24}), r"a tile of 3 x 3 patches cannot be unshuffled"),
        (lambda: internvl("llama", "meta", vision={"image_size": [32, 16]}), r"a tile of 4 x 2 patches cannot"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        trace_program(make())
