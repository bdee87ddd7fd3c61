"""Named symbolic sizes, and fake values that have them: what graphs know of shapes.

The sizes are `batch`, `images` (of a whole batch, tiles too), `patches` (vision patches of a whole batch), `windows`
(of their attention), `kept_tokens` (that an image has left inside the tower, at most), `visual_tokens`, `text_tokens`
and `past_tokens` (of a row), and `prefix` (see `foveate.ops.attention`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext


class Symbols:
    """One fake-tensor world for a whole program: named symbolic sizes, and fakes that use them."""

    # Unequal hints, none of them 0 or 1, so that no guard can mistake one size for another or for a constant. Small
    # shares of the visual tokens are more than 1 too.
    HINTS: ClassVar[dict[str, int]] = {
        "batch": 3,
        "images": 5,
        "patches": 1332,
        "windows": 83,
        "kept_tokens": 389,
        "visual_tokens": 10_000_019,
        "text_tokens": 211,
        "past_tokens": 307,
        "prefix": 23,
    }

    def __init__(self, hints: Mapping[str, int] = HINTS) -> None:
        self.hints = hints
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.mode.cache_enabled = False  # results are remembered here; an entry there takes longer than most ops
        self.sizes: dict[str, Any] = {}
        self._values: dict[Any, Any] = {}
        self._results: dict[Any, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """The symbolic size of that name, made on first use (any name: per-layer lengths have their own)."""
        if name not in self.sizes:
            hint = self.hints.get(name, 401 + 2 * len(self.sizes))
            context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            source = torch._dynamo.source.ConstantSource(f"size_{len(self.sizes)}")
            sample = torch.empty(hint, device="meta")
            fake = self.mode.from_tensor(sample, symbolic_context=context, source=source)
            self.sizes[name] = fake.shape[0]
        return self.sizes[name]

    def tensor(self, *shape: str | int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A fake tensor; sizes given by name are symbolic."""
        sizes = [self[s] if isinstance(s, str) else s for s in shape]
        with self.mode:
            return torch.empty(sizes, dtype=dtype, device=device)

    def like(self, value: Tensor) -> Tensor:
        """The shared fake of a real tensor's shape, dtype and device."""
        key = _key(value)
        if key not in self._values:
            self._values[key] = self.mode.from_tensor(value, static_shapes=True)
        fake: Tensor = self._values[key]
        return fake

    def shared(self, value: Any) -> Any:
        """The one object that stands for every value of this shape, dtype and device in the program."""
        if isinstance(value, (tuple, list)):
            return tuple(map(self.shared, value))
        return self._values.setdefault(_key(value), value)

    def evaluate(self, op: Any, args: Any, kwargs: Any) -> Any:
        """The shared value of op(*args, **kwargs); arguments are nodes, whose shared values are used, and constants.

        Layers repeat, so nearly every call has been made before: results are remembered by the values' identity.
        """
        key = (op, _frozen(args), _frozen(kwargs))
        if key not in self._results:
            fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            with self.mode, torch.no_grad():
                result = _meta_of(op, fake_args)(*_plain(fake_args), **{k: _plain(v) for k, v in fake_kwargs.items()})
            self._results[key] = self.shared(result)
        return self._results[key]

    def names(self) -> dict[Any, str]:
        """sympy symbol -> name, for printing and substitution."""
        return {size.node.expr: name for name, size in self.sizes.items()}


def _meta_of(op: Any, args: Any) -> Any:
    """What gives an op's value: the op itself, or what says the same in fewer symbolic steps."""
    if op == torch.ops.aten.linear.default:
        return _linear
    return _groups if op == torch.ops.aten.unflatten.int and args[2][0] == -1 else op


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear`, which torch writes as a product of matrices whose rows are all tokens of the batch."""
    if x.shape[-1] != weight.shape[1] or (bias is not None and bias.shape != weight.shape[:1]):
        sizes = [tuple(w.shape) for w in (x, weight, bias) if w is not None]
        raise RuntimeError(f"a linear of {' and '.join(map(str, sizes))}")
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _groups(x: Tensor, dim: int, sizes: list[int]) -> Tensor:
    """`unflatten` of n tokens into groups of r: [n // r, r], where torch writes [n // r, n // (n // r)]."""
    _, *rest = sizes
    return x.new_empty(*x.shape[:dim], x.shape[dim] // math.prod(rest), *rest, *x.shape[dim + 1 :])


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(map(_expression, value.shape)), value.dtype, str(value.device)
    return _expression(value)


def _frozen(value: Any) -> Any:
    """Arguments as a dictionary key: a node stands for its shared value."""
    if isinstance(value, fx.Node):
        return ("node", id(value.meta["val"]))
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    return (type(value), value)


def _plain(value: Any) -> Any:
    """FX's immutable lists as lists, which ops accept."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
