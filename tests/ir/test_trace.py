"""Tracing: the graph equals the model, and the model does not notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, SiglipVisionConfig
from transformers.masking_utils import AttentionMaskInterface

import foveate.kernels  # noqa: F401  registers what the ops compute
from foveate import ops
from foveate.errors import TraceError, UnsupportedModelError
from foveate.ir.program import info, outputs
from foveate.ir.rewriter import nodes_of
from foveate.models import decoder
from foveate.models.random import random_inputs
from foveate.models.registry import trace_joint, trace_program
from tests.ir.programs import HEADS, LAYERS, llava, model, traced, weightless


def near(actual: Any, expected: Tensor) -> None:
    assert isinstance(actual, Tensor)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_meta_and_real_weights_give_the_same_text() -> None:
    assert weightless()[1].to_text() == traced()[1].to_text()


def test_two_traces_and_two_sets_of_weights_give_the_same_text() -> None:
    assert trace_program(llava(seed=5)).to_text() == traced()[1].to_text()


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_every_decoder_layer_has_one_attention_node(kv_heads: int) -> None:
    joint, _ = traced(kv_heads)
    found = [n for n in joint.nodes if n.target == ops.attention]
    assert [info(n).layer for n in found] == list(range(LAYERS))
    for node in found:
        assert info(node).role == "self_attn"
        assert node.args[6] == "s:s"
        assert node.args[0][0].meta["val"].shape[1] == HEADS
        assert node.args[1][0].meta["val"].shape[1] == kv_heads


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_the_joint_graph_is_the_transformers_decoder(kv_heads: int) -> None:
    source = model(kv_heads)
    joint, program = traced(kv_heads)
    hidden = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0))
    places = torch.arange(11).repeat(2, 1)
    with torch.no_grad():
        expected = source.model.language_model(inputs_embeds=hidden, position_ids=places, use_cache=True)
        logits = source.lm_head(expected.last_hidden_state[:, -1:])
        actual = fx.GraphModule(program.weights, joint)(hidden, places, places)
    near(actual["out"], logits)
    assert len(actual["kv"]) == LAYERS
    for entry, layer in zip(actual["kv"], expected.past_key_values.layers, strict=True):
        assert entry[:2] == [None, None]
        near(entry[2], layer.keys)
        near(entry[3], layer.values)


@pytest.mark.parametrize("images", [1, 3])
def test_the_vision_graph_is_the_transformers_tower_and_projector(images: int) -> None:
    source = model()
    program = traced()[1]
    pixels = torch.randn(images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = source.model.get_image_features(pixels, return_dict=True).pooler_output
        actual = fx.GraphModule(program.weights, program.graphs["vision"])(pixels)
    near(actual["out"], torch.stack(list(expected)))


def test_every_recorded_linear_knows_its_module() -> None:
    _, program = traced()
    for stream in ("visual", "text"):
        for layer in range(LAYERS - 1):
            roles = {info(n).role for n in nodes_of(program.prefill, stream=stream, layer=layer) if "linear" in n.name}
            assert roles == {
                *(f"self_attn.{x}_proj" for x in "qkvo"),
                *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
            }


# --- the model is left as it was ----------------------------------------------------------------------


def state(source: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Everything about a model and the library that a trace could leave changed."""
    with torch.no_grad():
        logits = source(**inputs).logits
    return {
        "logits": logits.numpy().tobytes(),
        "attention": {
            name: m.config._attn_implementation for name, m in source.named_modules() if hasattr(m, "config")
        },
        "training": {name: m.training for name, m in source.named_modules()},
        "forward": {name: "forward" in vars(m) for name, m in source.named_modules()},
        "attributes": {name: sorted(vars(m)) for name, m in source.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in source.named_modules()},
        "config": source.config.to_dict(),
        "parameters": {
            name: (id(p), p.data_ptr(), p._version, p.requires_grad) for name, p in source.named_parameters()
        },
        "interfaces": (
            sorted(AttentionInterface._global_mapping),
            sorted(AttentionMaskInterface._global_mapping),
            sorted(AttentionInterface().keys()),
        ),
        "random": torch.get_rng_state().numpy().tobytes(),
        "gradients": torch.is_grad_enabled(),
    }


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[Any]:
    """What differs, smallest parts first by name."""
    found: list[Any] = []
    for name, value in before.items():
        if isinstance(value, dict):
            found += [
                (name, key, value[key], after[name].get(key)) for key in value if after[name].get(key) != value[key]
            ]
        elif after[name] != value:
            found.append(name)
    return found


def mixed() -> Any:
    """A model whose parts are set differently from each other."""
    source = llava(layers=2)
    source.set_attn_implementation({"": "sdpa", "vision_config": "eager", "text_config": "sdpa"})
    source.model.language_model.layers[0].mlp.train()
    source.model.vision_tower.train()
    source.lm_head.weight.requires_grad_(False)
    return source


def prepared(source: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    inputs = random_inputs(source, text_tokens=8)
    state(source, inputs)  # transformers adds hooks of its own on the first call
    return inputs, state(source, inputs)


def test_a_trace_leaves_the_model_as_it_was() -> None:
    source = mixed()
    inputs, before = prepared(source)
    trace_joint(source)
    assert changed(before, state(source, inputs)) == []


def broken(self: Any, hidden: Tensor, position_ids: Tensor) -> Tensor:
    raise RuntimeError("broken on purpose\nsecond line")


def test_a_trace_that_fails_in_the_model_leaves_it_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    source = mixed()
    inputs, before = prepared(source)
    monkeypatch.setattr(decoder.Decoder, "forward", broken)
    with pytest.raises(TraceError, match=r"could not be traced: .*broken on purpose$"):
        trace_joint(source)
    assert changed(before, state(source, inputs)) == []


def test_attention_with_what_foveate_does_not_know_is_refused_and_the_model_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = mixed()
    inputs, before = prepared(source)
    attention = type(source.model.language_model.layers[0].self_attn)
    original = attention.forward

    def windowed(self: Any, *args: Any, **options: Any) -> Any:
        return original(self, *args, **options, sliding_window=4)

    with monkeypatch.context() as patch:
        patch.setattr(attention, "forward", windowed)
        with pytest.raises(TraceError, match="LlamaAttention attends with `sliding_window`"):
            trace_joint(source)
    assert changed(before, state(source, inputs)) == []


def test_a_program_shares_the_weights_of_its_model() -> None:
    source, (_, program) = model(), traced()
    by_name = dict(source.named_parameters())
    for name, value in program.weights.items():
        if name in by_name:
            assert value is by_name[name]
    assert set(by_name) <= set(program.weights.names)


# --- variants -----------------------------------------------------------------------------------------


def rebuilt(change: Callable[[Any], None], **sizes: Any) -> Any:
    """A model of a changed configuration, on real memory, with random weights."""
    config = llava(device="meta", layers=2, **sizes).config
    change(config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = type(llava(device="meta", layers=2, **sizes))(config).eval()
        for parameter in made.parameters():
            if parameter.dim() == 1:
                nn.init.normal_(parameter, 1.0, 0.2)
    return made


def biased(config: Any) -> None:
    config.text_config.attention_bias = config.text_config.mlp_bias = True
    config.text_config.head_dim = 16
    config.text_config.hidden_act = "gelu_pytorch_tanh"
    config.vision_feature_layer = [-2, -1]
    config.text_config.rope_parameters = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1000.0}


def tied(config: Any) -> None:
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    config.text_config.rope_parameters = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 500.0,
    }
    config.vision_feature_layer = 1


@pytest.mark.parametrize("change", [biased, tied])
def test_variants_of_the_configuration_trace_to_the_same_function(change: Callable[[Any], None]) -> None:
    source = rebuilt(change)
    joint, program = trace_joint(source)
    hidden = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    places = torch.arange(9).repeat(2, 1)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = source.model.language_model(inputs_embeds=hidden, position_ids=places).last_hidden_state
        features = source.model.get_image_features(pixels, return_dict=True).pooler_output
        near(fx.GraphModule(program.weights, joint)(hidden, places, places)["out"], source.lm_head(states[:, -1:]))
        vision = fx.GraphModule(program.weights, program.graphs["vision"])(pixels)
    near(vision["out"], torch.stack(list(features)))
    if change is tied:
        assert "lm_head.weight" not in program.weights.names
        assert program.info.paths["embed"] in {str(n.target) for n in joint.nodes if n.op == "get_attr"}


# --- what is not supported ------------------------------------------------------------------------------


def tiny_llama() -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 16}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0))


def longrope(config: Any) -> None:
    config.text_config.rope_parameters = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 1000.0,
    }


def siglip(config: Any) -> None:
    config.vision_config = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_llama, r"model family 'llama' is not supported; supported: .*llava"),
        (lambda: llava(device="meta").model, r"LlavaModel has no language head; give the .*ForConditionalGeneration"),
        (
            lambda: rebuilt(longrope),
            r"rotary embedding 'longrope' depends on the prompt's length; supported: .*default",
        ),
        (lambda: rebuilt(siglip), r"a SigLIP tower with a pooling head is not supported"),
        (
            lambda: rebuilt(lambda c: setattr(c, "vision_feature_select_strategy", "full")),
            r"vision_feature_select_strategy 'full'.*use 'default'",
        ),
        (lambda: nn.Linear(2, 2), r"Linear is not a transformers model"),
        (lambda: None, r"NoneType is not a transformers model"),
        (lambda: "llava", r"str is not a transformers model"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        trace_program(make())


def test_the_outputs_of_a_joint_graph_are_logits_and_every_layers_keys() -> None:
    joint, _ = traced()
    value = outputs(joint)
    assert set(value) == {"out", "kv"}
    assert [info(entry[2]).layer for entry in value["kv"]] == list(range(LAYERS))
