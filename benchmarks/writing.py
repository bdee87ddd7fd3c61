"""What the benchmarks' reports have in common."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Z = 1.959964
"""Of a 95% interval."""


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def versions(about: dict[str, Any]) -> str:
    """What `foveate.machine.environment` says of the software, as a phrase."""
    return ", ".join(f"{name} {about[name]}" for name in ("foveate", "torch", "transformers", "python"))


def wilson(right: int, n: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson's, which is fair near 0 and 1 too)."""
    p, spread = right / n, Z * Z / n
    middle = (p + spread / 2) / (1 + spread)
    half = Z * math.sqrt(p * (1 - p) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
