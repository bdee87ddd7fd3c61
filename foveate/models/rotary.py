"""Rotary embeddings: which are known, and how far they stay what a graph has of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from foveate.errors import UnsupportedModelError

STATIC = {"default", "linear", "llama3", "yarn"}
"""Those whose frequencies do not depend on the prompt's length."""

DYNAMIC = "dynamic"
"""The one whose frequencies do not up to `max_position_embeddings` positions; those are `default`'s till then."""


def position_limit(text: Any) -> int | None:
    """Positions that a decoder with this configuration has before its frequencies change; None: they never do.

    Raises UnsupportedModelError for rotary embeddings that depend on the prompt's length in another way.
    """
    given = getattr(text, "rope_parameters", None) or {}
    # Some decoders have others in each kind of layer, by that kind's name.
    kinds = [kind for kind in sorted(set(getattr(text, "layer_types", None) or ())) if kind in given]
    ropes = {f" ({kind})": given[kind] or {} for kind in kinds} or {"": given}
    found = {where: rope.get("rope_type", "default") for where, rope in ropes.items()}
    for where, rope in found.items():
        if rope not in {*STATIC, DYNAMIC}:
            raise UnsupportedModelError(
                f"rotary embedding {rope!r}{where} depends on the prompt's length; supported: "
                f"{', '.join(sorted({*STATIC, DYNAMIC}))}"
            )
    return int(text.max_position_embeddings) if DYNAMIC in found.values() else None


@contextmanager
def below_limit(model: nn.Module, limit: int | None) -> Iterator[None]:
    """While open, dynamic rotary embeddings of a model with such a limit are what they are up to it; then as before.

    A model that has seen a longer prompt holds other frequencies, but the first ones too.
    """
    modules: Iterable[Any] = () if limit is None else model.modules()
    with ExitStack() as stack:
        for module in modules:
            kinds = getattr(module, "rope_type", None)
            by_kind = kinds if isinstance(kinds, dict) else {"": kinds}
            growing = [kind for kind, rope in by_kind.items() if rope == DYNAMIC]
            if growing:
                fixed = {**by_kind, **dict.fromkeys(growing, "default")}
                stack.callback(setattr, module, "rope_type", kinds)
                module.rope_type = fixed if isinstance(kinds, dict) else "default"
            for prefix in (f"{kind}_" if kind else "" for kind in growing):
                stack.callback(setattr, module, f"{prefix}inv_freq", getattr(module, f"{prefix}inv_freq"))
                setattr(module, f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq"))
        yield
