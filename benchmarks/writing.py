"""What the benchmarks' reports have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def versions(about: dict[str, Any]) -> str:
    """What `foveate.machine.environment` says of the software, as a phrase."""
    return ", ".join(f"{name} {about[name]}" for name in ("foveate", "torch", "transformers", "python"))
