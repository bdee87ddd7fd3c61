"""Figures and layer ranges in the words of the diff page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from foveate.report.figures import count, ms, size

_WHOLE = {
    "kv_bytes": "KV cache",
    "peak_bytes": "peak memory",
    "first_token_s": "time to first token",
    "first_token_flops": "FLOPs to first token",
}
_LAST = {
    "flops": "FLOPs",
    "bytes": "bytes moved",
    "time_s": "predicted time",
    "weight_bytes": "of them weights",
    "activation_bytes": "of them activations",
    "kv_bytes": "of them keys and values",
}


def number(value: Any) -> float | None:
    """A figure of the data as a float, infinite where it is too large for one; None where it is no number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def duration(seconds: float) -> str:
    """0.0123 -> 12.3 ms; 8.5e-06 -> 8.5 us, with the sign for micro."""
    if 0 < seconds < 1e-3:
        return f"{1e6 * seconds:.3g} \N{MICRO SIGN}s"
    return f"{ms(seconds)} ms" if seconds < 10 else f"{seconds:.3g} s"


def shown(quantity: str, value: float | None) -> str:
    """A cost in its unit, by the dotted name of the quantity."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return "\N{INFINITY}"
    return _unit(quantity)(value)


def _unit(quantity: str) -> Callable[[float], str]:
    last = quantity.rsplit(".", 1)[-1]
    if last == "nodes":
        return "{:,.0f}".format
    if last.endswith("bytes"):
        return size
    return duration if last.endswith("_s") else count


def label(quantity: str) -> str:
    """`prefill.flops` -> FLOPs (its graph is the table's own row); `kv_bytes` -> KV cache."""
    if quantity in _WHOLE:
        return _WHOLE[quantity]
    last = quantity.partition(".")[2] or quantity
    return _LAST.get(last, last.replace("_", " "))


def change_text(change: float | None, a: float | None, b: float | None) -> str:
    """A relative change with its sign; `new` where there was nothing before."""
    if a == b:
        return "no change"
    if change is None or not math.isfinite(change):
        return "new" if not a else "-"
    percent = f"{100 * abs(change):.1f}%" if abs(change) < 9.995 else f"{100 * abs(change):.0f}%"
    return f"{'+' if change > 0 else chr(0x2212)}{percent}"


def arrows(text: str) -> str:
    """`11008 -> 5504` with a true arrow."""
    return text.replace(" -> ", " \N{RIGHTWARDS ARROW} ")


def layers_text(layers: Sequence[int], count: int | None = None) -> str:
    """[2, 15] -> layers 2-15 (with a dash); -1 holds what comes before them, `count` what comes after them."""
    first, last = layers
    if first == last == -1:
        return "inputs"
    if count is not None and first == last == count:
        return "output"
    return f"layer {first}" if first == last else f"layers {first}\N{EN DASH}{last}"
