"""Figures as people read them, short enough for a table."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

_STEPS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(value: float) -> str:
    """1234567890 -> 1.23G."""
    for size, letter in _STEPS:
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{letter}" if value < 999.5 * size else f"{value / size:.0f}{letter}"
    return f"{value:.0f}"


def ms(seconds: float) -> str:
    """Seconds as milliseconds: 0.0123 -> 12.3."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def size(nbytes: float) -> str:
    """1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            break
        nbytes /= 1024
    return f"{nbytes:.0f} {unit}" if unit == "B" or nbytes >= 100 else f"{nbytes:.3g} {unit}"


def spaced(passes: str) -> str:
    """A pipeline with a space after each pass, so that it can be broken into lines; it still parses."""
    return passes.replace("},", "}, ")


def folded(text: str, width: int = 80) -> str:
    """One remark in lines of at most `width`, the later ones indented."""
    return textwrap.fill(text, width, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False)


def times(ratio: float) -> str:
    """A speed-up: 3.1 -> 3.10x."""
    return f"{ratio:.2f}x"


def percent(share: float) -> str:
    """0.9375 -> 93.8%."""
    return f"{100 * share:.1f}%"


UNITS: dict[str, Callable[[float], str]] = {
    "prefill_flops": count,
    "kv_bytes": size,
    "prefill_s": lambda seconds: f"{ms(seconds)} ms",
}
LABELS = {"prefill_flops": "prefill FLOPs", "kv_bytes": "KV cache", "prefill_s": "predicted prefill"}
"""What a pass changes, as `foveate.ir.cost.prefill_cost` names it: how it is shown, and called."""
