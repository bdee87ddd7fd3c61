"""Equal layers are recorded once, which is most of the time that tracing a deep model takes.

    h = layers[0](h, cos);  h = layers[1](h, cos)      h = end(layers[0](begin(h), cos));  h = again(h, "layers.1")

While `equal_layers_once` is open, a layer that is built as an earlier one of its list and is called with the same
other arguments runs as one op `again`; `import_graph` writes what lies between the earlier one's `begin` and `end` once
more, with the weights of the layer that is named. Anything unequal is recorded itself. With `bare`, layers built as
earlier ones have no weights meanwhile, each of which torch.export would carry along; should one be called in another
way after all, UnequalError says that the recording has to be made again with their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

LIBRARY = torch.library.Library("foveate_trace", "DEF")
LIBRARY.define("begin(Tensor x, str path) -> Tensor")
LIBRARY.define("end(Tensor x) -> Tensor")
LIBRARY.define("again(Tensor x, str path, str of) -> Tensor")
begin, end, again = (getattr(torch.ops.foveate_trace, name).default for name in ("begin", "end", "again"))

for _name in ("begin", "end", "again"):
    torch.library.register_fake(f"foveate_trace::{_name}", lambda x, *names: torch.empty_like(x), lib=LIBRARY)

_MAY_DIFFER = {"layer_idx", "_parameters", "_buffers"}
"""Attributes of layers which compute the same: their number, and weights, of which the form is compared."""

_WEIGHTS = ("_parameters", "_buffers")


@dataclass
class _Call:
    """How a layer was called when it was recorded, and what shapes it took and gave."""

    others: Any
    tensors: list[tuple[Any, torch.dtype]]

    @property
    def shapes(self) -> list[Any]:
        """As they are by now: what came after the call may have said that two of its sizes are one."""
        return [_form(*each) for each in self.tensors]


class UnequalError(Exception):
    """A layer without its weights is called in another way than the layer that it is built as."""


@contextmanager
def equal_layers_once(model: nn.Module, bare: bool) -> Iterator[None]:
    """While open, each list of layers in `model` records its equal members once; afterwards nothing is left."""
    done: list[str] = []
    with ExitStack() as stack:
        for path, layers in model.named_modules():
            if isinstance(layers, nn.ModuleList) and len(layers) > 1 and not path.startswith(tuple(done)):
                done.append(path + ".")
                calls: dict[int, _Call] = {}
                firsts = [next(i for i in range(n + 1) if i == n or alike(layers, i, n)) for n in range(len(layers))]
                for number, (layer, first) in enumerate(zip(layers, firsts, strict=True)):
                    if "forward" not in vars(layer):
                        stack.callback(delattr, layer, "forward")
                        record = _unequal if bare and first != number else layer.forward
                        object.__setattr__(layer, "forward", _recorder(record, path, number, first, calls))
                        # The modules themselves stay: transformers may put hooks on them now, and never again.
                        for module in layer.modules() if record is _unequal else ():
                            stack.callback(vars(module).update, {name: vars(module)[name] for name in _WEIGHTS})
                            vars(module).update({name: {} for name in _WEIGHTS})
        yield


def _unequal(*args: Any, **kwargs: Any) -> Any:
    raise UnequalError


def _recorder(
    forward: Callable[..., Any], path: str, number: int, first: int, calls: dict[int, _Call]
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not args or not isinstance(args[0], Tensor):
            return forward(*args, **kwargs)
        x, others = args[0], (args[1:], kwargs)
        known = calls.get(first)
        if known and known.shapes == [_form(x.shape, x.dtype)] * 2 and _same(known.others, others):
            return again(x, f"{path}.{number}", f"{path}.{first}")
        out = forward(begin(x, f"{path}.{number}"), *args[1:], **kwargs)
        if not isinstance(out, Tensor):
            return out
        calls[number] = _Call(others, [(each.shape, each.dtype) for each in (x, out)])
        return end(out)

    return run


def alike(layers: nn.ModuleList, one: int, other: int) -> bool:
    """Whether two layers are built the same, down to every attribute and what configurations say of each."""
    if not _same(layers[one], layers[other]):
        return False
    configs = {id(m.config): m.config for m in layers[other].modules() if hasattr(m, "config")}
    lists = [v for c in configs.values() for v in vars(c).values() if isinstance(v, (list, tuple))]
    return all(v[one] == v[other] for v in lists if len(v) > max(one, other))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, nn.Module):
        weights = [[*m._parameters.items(), *m._buffers.items()] for m in (a, b)]
        if [(name, _kind(x)) for name, x in weights[0]] != [(name, _kind(x)) for name, x in weights[1]]:
            return False
        rest = [{k: v for k, v in vars(m).items() if k not in _MAY_DIFFER} for m in (a, b)]
        return _same(*rest)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, partial):  # as transformers' own activations are
        return _same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    # Of anything else, tensors among them, equal values do not say that it is the same.
    plain = (bool, int, float, str, set, torch.dtype, torch.device)
    return isinstance(a, plain) and bool(a == b)


def _kind(x: Tensor | None) -> Any:
    return None if x is None else (_form(x.shape, x.dtype), x.device, x.requires_grad)


def _form(shape: Any, dtype: torch.dtype) -> Any:
    return [s.node.expr if isinstance(s, torch.SymInt) else s for s in shape], dtype
