"""Which model families foveate knows, and how a model of a known family becomes a program."""

from __future__ import annotations

from typing import Any

from torch import nn

from foveate.errors import UnsupportedModelError
from foveate.ir.collector import collector_paused
from foveate.ir.decode import derive_decode
from foveate.ir.program import Program, Symbols, Weights
from foveate.ir.rules import verify
from foveate.ir.split import split
from foveate.ir.tail import keep_last
from foveate.ir.trace import captured_attention
from foveate.models.decoder import decoder_inputs
from foveate.models.family import Family
from foveate.models.gemma3 import Gemma3
from foveate.models.internvl import InternVL
from foveate.models.llava import Llava
from foveate.models.llava_next import LlavaNext
from foveate.models.llava_onevision import LlavaOnevision
from foveate.models.qwen2_5_vl import Qwen25VL
from foveate.models.qwen3_vl import Qwen3VL
from foveate.models.qwen3_vl_moe import Qwen3VLMoe
from foveate.models.qwen_vl import Qwen2VL
from foveate.models.recording import first_names, record_graph
from foveate.models.rotary import below_limit
from foveate.models.smolvlm import SmolVLM

FAMILIES: dict[str, Family] = {
    "llava": Llava(),
    "internvl": InternVL(),
    "qwen2_vl": Qwen2VL(),
    "llava_next": LlavaNext(),
    "llava_onevision": LlavaOnevision(),
    "qwen2_5_vl": Qwen25VL(),
    "qwen3_vl": Qwen3VL(),
    "qwen3_vl_moe": Qwen3VLMoe(),
    "smolvlm": SmolVLM(),
    "idefics3": SmolVLM(),
    "gemma3": Gemma3(),
}
"""Hugging Face `model_type` -> what is known of the family."""


def family_of(model: Any) -> Family:
    """The family of a transformers model.

    Raises UnsupportedModelError naming what was given and what is supported.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    known = ", ".join(FAMILIES)
    if not isinstance(model, nn.Module) or kind is None:
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model; supported families: {known}")
    if kind not in FAMILIES:
        raise UnsupportedModelError(f"model family {kind!r} is not supported; supported: {known}")
    if getattr(model, "peft_config", None) or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} has adapters: merge them first (merge_and_unload()), or add them to the optimized "
            "model (peft.get_peft_model(foveate.optimize(...), config))"
        )
    if not type(model).__name__.endswith("ForConditionalGeneration"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language head; give the ...ForConditionalGeneration model"
        )
    return FAMILIES[kind]


@collector_paused()
def trace_program(model: Any) -> Program:
    """The program of a model: `vision`, `prefill` (in split form) and `decode` graphs over the model's own weights.

    The model may be on any device, `meta` included, where no weight is ever read. It is left as it was.
    """
    joint, program = trace_joint(model)
    program.graphs["prefill"] = keep_last(program, split(program, joint))
    program.graphs["decode"] = derive_decode(program)
    verify(program)
    return program


def trace_joint(model: Any) -> tuple[Any, Program]:
    """The decoder before splitting, and a program that holds the vision graph and the weights."""
    family = family_of(model)
    about = family.describe(model.config)
    with below_limit(model, about.position_limit), captured_attention(model, windows=family.whole_images):
        program = Program(info=about, weights=_weights(model), symbols=Symbols())
        program.graphs["vision"] = record_graph(
            program,
            model,
            family.vision(model),
            lambda size: family.vision_inputs(about, size),
            layers=family.tower_layers(model),
            causal=False,
        )
        joint = record_graph(
            program,
            model,
            family.decoder(model),
            lambda size: decoder_inputs(about.hidden_size, family.position_axes, size, about.deepstack),
            layers=about.layers,
            causal=True,
            reach=family.whole_images,
        )
    return joint, program


def _weights(model: nn.Module) -> Weights:
    weights = Weights()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in dict.fromkeys(first_names(model).values()):
        weights.put(name, named[name])
    return weights
