"""Recording equal layers once gives what recording each of them gives, and unequal ones are told apart."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from foveate.ir.repeated import alike
from foveate.models import recording
from foveate.models.registry import trace_program
from tests.ir.programs import llava
from tests.models import tiny


def deep() -> Any:
    return llava(layers=5, vision_layers=4)


def recorded(model: Any) -> list[int]:
    """Decoder layers that run while the model is traced."""
    ran = []
    layers = model.model.language_model.layers
    forwards = [type(layer.mlp).forward for layer in layers]
    number = {id(layer.mlp): i for i, layer in enumerate(layers)}

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        ran.append(number[id(self)])
        return forwards[0](self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layers[0].mlp), "forward", forward)
        trace_program(model)
    return ran


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [deep, tiny.qwen2_vl, tiny.qwen2_5_vl, tiny.qwen3_vl, tiny.internvl, tiny.smolvlm, tiny.gemma3],
)
def test_the_text_is_that_of_a_recording_of_every_layer(
    make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make()
    once = trace_program(source).to_text()
    assert not any("forward" in vars(m) for m in source.modules()), "the model is as it was"
    monkeypatch.setattr(recording, "equal_layers_once", lambda model, bare: nullcontext())
    assert trace_program(source).to_text() == once


@pytest.mark.slow
def test_equal_layers_run_once() -> None:
    assert recorded(deep()) == [0]


@pytest.mark.slow
def test_layers_of_two_kinds_run_once_each() -> None:
    assert recorded(tiny.gemma3(kinds="sliding full sliding full", num_hidden_layers=4)) == [0, 1]


@pytest.mark.slow
def test_sizes_that_turn_out_to_be_one_between_two_layers_keep_them_equal() -> None:
    # The batch of what Qwen3-VL adds behind its first layer is known to be the batch of the text from there on.
    assert recorded(tiny.qwen3_vl()) == [0]


def test_activations_that_are_functions_with_arguments_are_compared_by_those() -> None:
    layers = tiny.gemma3().model.vision_tower.encoder.layers
    assert alike(layers, 0, 1)
    layers[1].mlp.activation_fn.act = partial(torch.nn.functional.gelu, approximate="none")
    assert not alike(layers, 0, 1)


def test_a_layer_with_an_attribute_of_its_own_is_recorded_itself() -> None:
    model = deep()
    model.model.language_model.layers[2].input_layernorm.variance_epsilon = 0.5
    assert recorded(model) == [0, 2]


def test_a_layer_with_a_hook_is_recorded_itself() -> None:
    model = deep()
    model.model.language_model.layers[3].self_attn.o_proj.register_forward_hook(lambda *a: None)
    assert recorded(model) == [0, 3]


def test_a_layer_with_weights_of_another_form_is_recorded_itself() -> None:
    model = deep()
    old = model.model.language_model.layers[1].self_attn.o_proj
    model.model.language_model.layers[1].self_attn.o_proj = nn.Linear(old.in_features, old.out_features, bias=True)
    assert recorded(model) == [0, 1]


def test_a_layer_whose_hook_changes_what_it_is_given_is_recorded_itself() -> None:
    model = deep()
    layer = model.model.language_model.layers[2]

    def other(module: nn.Module, args: Any, options: Any) -> Any:
        cos, sin = options["position_embeddings"]
        return args, {**options, "position_embeddings": (sin, cos)}

    layer.register_forward_pre_hook(other, with_kwargs=True)
    assert 2 in recorded(model)


def test_a_layer_that_is_called_in_another_way_is_recorded_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep()
    third = model.model.language_model.layers[2]

    def call(self: Any, *args: Any, **options: Any) -> Any:
        if self is third:
            cos, sin = options["position_embeddings"]
            options["position_embeddings"] = (sin, cos)
        return nn.Module.__call__(self, *args, **options)

    monkeypatch.setattr(type(third), "__call__", call)
    before = {name: id(value) for name, value in model.named_parameters()}
    # The recording that leaves weights out is given up at layer 2; the next one has them all.
    assert recorded(model) == [0, 0, 2]
    assert {name: id(value) for name, value in model.named_parameters()} == before
    assert not any("forward" in vars(m) for m in model.modules())


def test_a_model_that_was_traced_still_gives_all_of_its_attention() -> None:
    model = deep()
    trace_program(model)  # while transformers first looks for the modules whose outputs it can return
    model.set_attn_implementation("eager")
    pixels = torch.randn(1, 3, *[model.config.vision_config.image_size] * 2)
    out = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    assert len(out.attentions) == 4 and len(out.hidden_states) == 5


def test_what_a_configuration_says_of_each_layer_tells_them_apart() -> None:
    layers = deep().model.language_model.layers
    assert alike(layers, 0, 1)
    layers[0].self_attn.config.layer_types = ["full_attention", "sliding_attention", *["full_attention"] * 3]
    assert not alike(layers, 0, 1)
    assert alike(layers, 0, 2)


def test_tensors_that_are_no_weights_must_be_the_same_ones() -> None:
    layers = deep().model.language_model.layers
    layers[0].mlp.scale, layers[1].mlp.scale = torch.ones(2), torch.ones(2)
    assert not alike(layers, 0, 1)
    layers[1].mlp.scale = layers[0].mlp.scale
    assert alike(layers, 0, 1)
