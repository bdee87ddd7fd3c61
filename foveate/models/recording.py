"""One recorded graph of a model: example inputs for the recording, symbolic ones for the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.ir.program import Program
from foveate.ir.repeated import UnequalError, equal_layers_once
from foveate.ir.trace import import_graph, record

Size = Callable[[str], Any]
"""A size by name, such as `images`: a number for the recording, a symbol for the program."""

Inputs = dict[str, tuple[tuple[Any, ...], torch.dtype | None]]
"""Input name -> its shape, and its dtype where that is not the model's own."""

SAMPLE = {"batch": 2, "sequence": 17}
"""Sizes of a recording's inputs that differ from `Symbols.HINTS`."""


class Wrapper(nn.Module):
    """A module around a whole model, of which it calls what a graph is recorded of."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model


def record_graph(
    program: Program,
    model: Any,
    module: Wrapper,
    inputs: Callable[[Size], Inputs],
    layers: int,
    causal: bool,
    reach: bool = False,
) -> Any:
    """Record `module`, which is around `model`, and import it into `program`.

    inputs: the module's inputs, in order, whose sizes come from the function they are given. layers, causal, reach:
    see `foveate.ir.trace.import_graph`. Call it while `captured_attention(model)` is open.
    """
    device = model.device
    symbolic = inputs(program.symbols.__getitem__)
    numbers = inputs({**program.symbols.HINTS, **SAMPLE}.__getitem__)
    samples = [torch.zeros(s, dtype=dtype or model.dtype, device=device) for s, dtype in numbers.values()]
    dynamic = [
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(sizes) if isinstance(size, torch.SymInt)}
        for sizes, _ in symbolic.values()
    ]
    try:
        with equal_layers_once(model, bare=True):
            recorded = record(module, tuple(samples), tuple(dynamic))
    except UnequalError:
        with equal_layers_once(model, bare=False):
            recorded = record(module, tuple(samples), tuple(dynamic))
    fakes: dict[str, Tensor] = {
        name: program.symbols.tensor(*sizes, dtype=dtype or model.dtype, device=device)
        for name, (sizes, dtype) in symbolic.items()
    }
    first = first_names(model)
    return import_graph(program, recorded, fakes, layers, lambda n: first[n.removeprefix("model.")], causal, reach)


def first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a weight -> the first name of the same weight, so that tied weights are one."""
    named = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    seen: dict[int, str] = {}
    return {name: seen.setdefault(id(value), name) for name, value in named}
