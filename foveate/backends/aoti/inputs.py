"""A graph's inputs, held to what it was compiled for: native code would read past the end of smaller ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from foveate.backends.aoti.compiling import SMALLEST
from foveate.backends.base import Inputs
from foveate.errors import InputError


def check_inputs(graph: fx.Graph) -> Callable[[Inputs], None]:
    """A function that raises InputError where an input has another dtype or shape, or equal sizes are not equal."""
    wanted = [(str(n.target), n.meta["val"]) for n in graph.nodes if n.op == "placeholder"]
    tensors = [(name, x.dtype, tuple(map(_expression, x.shape))) for name, x in wanted if isinstance(x, Tensor)]
    numbers = [name for name, x in wanted if not isinstance(x, Tensor)]

    def check(inputs: Inputs) -> None:
        sizes: dict[Any, int] = {}
        for name, dtype, shape in tensors:
            value = inputs[name]
            if not isinstance(value, Tensor) or value.dtype != dtype or value.dim() != len(shape):
                raise InputError(f"{name} must be a tensor of {dtype} with {len(shape)} axes, it is {_about(value)}")
            for axis, (size, expected) in enumerate(zip(value.shape, shape, strict=True)):
                known = expected if isinstance(expected, int) else sizes.setdefault(expected, size)
                if size != known:
                    raise InputError(f"{name} is {_about(value)}; axis {axis} must have size {known}")
        for name in numbers:
            number = inputs[name]
            if not isinstance(number, int) or number < SMALLEST:
                raise InputError(f"{name} must be a whole number from {SMALLEST} on, it is {number!r}")

    return check


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _about(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
