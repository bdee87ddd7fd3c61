"""A program's symbolic sizes as numbers, and how many bits its numbers have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from foveate.errors import InputError
from foveate.ir.cost.devices import BITS
from foveate.ir.program import Program


class Sizes:
    """Values for a program's symbolic sizes."""

    def __init__(self, program: Program, values: Mapping[str, int]) -> None:
        self.names = dict(values)
        self.grid = program.info.grid
        self.shortened = program.shortens
        self.values = {symbol: values[name] for symbol, name in program.symbols.names().items() if name in values}
        self.known: dict[Any, int] = {}

    def of(self, size: Any) -> int:
        """A size, symbolic or not, as a number."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = size.node.expr
        if expression not in self.known:
            self.known[expression] = int(expression.subs(self.values))
        return self.known[expression]

    def shape(self, node: fx.Node) -> list[int]:
        """The shape of a node's value in numbers."""
        return [self.of(s) for s in node.meta["val"].shape]

    def numel(self, node: fx.Node) -> int:
        """How many elements a node's value has; 0 for what is no tensor."""
        return math.prod(self.shape(node)) if isinstance(node.meta.get("val"), Tensor) else 0


@dataclass(frozen=True)
class Precision:
    """Bits of a program's numbers: activations (and the rate of arithmetic), weights, cached keys and values.

    own: the format the program was traced in; values of another one (indices, fp32 islands) keep their width.
    """

    dtype: str
    own: torch.dtype
    weight_bits: int
    kv_bits: int

    @classmethod
    def of(cls, program: Program, dtype: str | None, weight_bits: int | None, kv_bits: int | None) -> Precision:
        """As asked for; None is what the program has, or as wide as `dtype`. Raises InputError for what is unknown."""
        name = dtype or str(program.dtype).removeprefix("torch.")
        if name not in BITS:
            raise InputError(f"dtype {name!r} is not known to a forecast; there are: {', '.join(BITS)}")
        for option, bits in (("weight_bits", weight_bits), ("kv_bits", kv_bits)):
            if bits is not None and bits not in (4, 8, 16, 32):
                raise InputError(f"{option}={bits}; allowed: 4, 8, 16, 32")
        return cls(name, program.dtype, weight_bits or BITS[name], kv_bits or BITS[name])

    @property
    def bits(self) -> int:
        """Of an activation."""
        return BITS[self.dtype]

    def bits_of(self, value: Tensor, kind: str) -> int:
        """Of one element of a value; kind: `weight`, `kv` or `activation`."""
        if value.dtype != self.own:
            return 8 * value.element_size()
        if kind == "weight":
            # Norms and biases stay as activations are; only matrices are quantized.
            return self.weight_bits if value.dim() > 1 else max(self.bits, 16)
        return self.kv_bits if kind == "kv" else self.bits
