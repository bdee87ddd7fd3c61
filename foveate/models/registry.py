"""Which model families foveate knows, and how a model of a known family becomes a program."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import nn

from foveate.errors import UnsupportedModelError
from foveate.ir.decode import derive_decode
from foveate.ir.program import Program, Symbols, Weights
from foveate.ir.rules import verify
from foveate.ir.split import split
from foveate.ir.tail import keep_last
from foveate.ir.trace import captured_attention, import_graph, record
from foveate.models import llava

FAMILIES: dict[str, ModuleType] = {"llava": llava}
"""Hugging Face `model_type` -> the module that knows the family."""


def family_of(model: Any) -> ModuleType:
    """The family module of a transformers model.

    Raises UnsupportedModelError naming what was given and what is supported.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    known = ", ".join(sorted(FAMILIES))
    if not isinstance(model, nn.Module) or kind is None:
        raise UnsupportedModelError(f"{type(model).__name__} is not a transformers model; supported families: {known}")
    if kind not in FAMILIES:
        raise UnsupportedModelError(f"model family {kind!r} is not supported; supported: {known}")
    if not type(model).__name__.endswith("ForConditionalGeneration"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language head; give the ...ForConditionalGeneration model"
        )
    return FAMILIES[kind]


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
    weights = _weights(model)
    program = Program(info=about, weights=weights, symbols=Symbols())
    device, dtype = model.device, model.dtype
    sizes = program.symbols.HINTS
    dynamic = torch.export.Dim.DYNAMIC
    with captured_attention(model):
        pixels = torch.zeros(sizes["images"], *about.image_size, dtype=dtype, device=device)
        vision = record(family.Vision(model), (pixels,), ({0: dynamic},))
        hidden = torch.zeros(2, 17, about.hidden_size, dtype=dtype, device=device)
        positions = torch.arange(17, device=device).repeat(2, 1)
        decoder = record(family.Decoder(model), (hidden, positions), ({0: dynamic, 1: dynamic},) * 2)
    symbolic = program.symbols.tensor
    first = _first_names(model)
    inputs = {"pixel_values": symbolic("images", *about.image_size, dtype=dtype, device=device)}
    program.graphs["vision"] = import_graph(
        program, vision, inputs, family.tower_layers(model), lambda n: first[n.removeprefix("model.")], causal=False
    )
    inputs = {
        "hidden": symbolic("batch", "sequence", about.hidden_size, dtype=dtype, device=device),
        "position_ids": symbolic("batch", "sequence", dtype=torch.int64, device=device),
    }
    joint = import_graph(program, decoder, inputs, about.layers, lambda n: first[n.removeprefix("model.")], causal=True)
    return joint, program


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a weight -> the first name of the same weight, so that tied weights are one."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    seen: dict[int, str] = {}
    return {name: seen.setdefault(id(value), name) for name, value in named}


def _weights(model: nn.Module) -> Weights:
    weights = Weights()
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name in dict.fromkeys(_first_names(model).values()):
        weights.put(name, named[name])
    return weights
