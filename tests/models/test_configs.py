"""The shipped configurations: they are the models whose names they bear, and trace without weights."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig

from foveate.errors import InputError, UnsupportedModelError
from foveate.ir.cost import cost_of
from foveate.models import configs
from tests.models.tiny import qwen2_vl
from tests.shipped import shipped

# Parameters as cards on the Hugging Face Hub, or sizes of files there, say, and visual tokens of one image or tile.
PUBLISHED = {
    "gemma-3-4b": (4.3e9, 256),
    "idefics3-8b": (8.465e9, 169),
    "internvl2-26b": (25.5e9, 256),
    "internvl2-4b": (4.15e9, 256),
    "internvl2-8b": (8.08e9, 256),
    "internvl3.5-8b": (8.5e9, 256),
    "llava-1.5-13b": (13.35e9, 576),
    "llava-1.5-7b": (7.06e9, 576),
    "llava-onevision-qwen2-7b": (8.03e9, 729),
    "llava-v1.6-vicuna-7b": (7.06e9, 576),
    "qwen2-vl-7b": (8.29e9, 256),
    "qwen2.5-vl-7b": (8.29e9, 256),
    "qwen3-vl-30b-a3b": (31e9, 256),
    "qwen3-vl-4b": (4.44e9, 256),
    "smolvlm2-2.2b": (2246784880, 81),
}
each = pytest.mark.parametrize("name", PUBLISHED)


def test_the_names_are_these() -> None:
    assert configs.names() == sorted(PUBLISHED)


@each
def test_a_model_has_as_many_parameters_as_its_card_says_and_takes_no_memory(name: str) -> None:
    model = configs.weightless(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(PUBLISHED[name][0], rel=0.01)
    assert configs.read(name)["published_parameters"] == PUBLISHED[name][0]
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not model.training


@each
@pytest.mark.slow
def test_a_configuration_traces_and_costs_what_its_sizes_say(name: str) -> None:
    program = shipped(name)
    about, tokens = program.info, PUBLISHED[name][1]
    assert about.tokens_per_image == tokens
    cost = cost_of(program, text_tokens=60)
    # Every token but the last of the prompt's runs through each layer's linears; attention and the head come on top.
    attended = 2 * about.hidden_size * about.head_dim * (about.heads + about.kv_heads)
    linears = 2 * about.layers * (attended + 3 * about.hidden_size * about.intermediate_size)
    assert 0.9 < cost.prefill.flops / ((tokens + 60) * linears) < 1.1
    assert cost.vision.flops > 2e11
    assert cost.decode.flops < cost.prefill.flops / tokens * 1.5


def test_a_configuration_says_what_it_is_and_where_it_comes_from() -> None:
    for name in configs.names():
        value = configs.read(name)
        assert set(value) == {"about", "source", "published_parameters", "config"}
        # A published file has an address; a configuration put together from several sources says so.
        assert value["source"].startswith(("https://huggingface.co/", "put together: ")), name
        assert configs.config_of(name).model_type == value["config"]["model_type"]


def test_the_case_of_a_name_does_not_matter_and_dtypes_are_the_callers() -> None:
    assert configs.config_of("LLaVA-1.5-7B").to_dict() == configs.config_of("llava-1.5-7b").to_dict()
    assert configs.weightless("llava-1.5-7b", torch.float32).dtype == torch.float32


@pytest.mark.parametrize("name", ["llava-1.5-34b", "", "../llava-1.5-7b", "llava-1.5-7b.json"])
def test_an_unknown_name_is_refused_with_those_that_exist(name: str) -> None:
    for function in (configs.read, configs.config_of, configs.weightless):
        with pytest.raises(
            InputError, match=r"there is no configuration .*; there are: .*internvl2-26b, .*qwen2-vl-7b"
        ):
            function(name)


def test_a_configuration_of_ones_own_is_taken_too() -> None:
    model = configs.weightless(qwen2_vl("meta").config, torch.float16)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.dtype == torch.float16


@pytest.mark.parametrize("config", [BertConfig(), {"model_type": "llava"}, None])
def test_what_is_no_image_text_model_is_refused(config: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"is no configuration of an image-text model; shipped: |shipped"):
        configs.weightless(config)
