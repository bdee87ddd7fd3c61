"""What the benchmarks have in common: where their results go, and what must be installed."""

from __future__ import annotations

from argparse import ArgumentParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def needs(parser: ArgumentParser, *packages: str) -> None:
    """Ends at once, with one line, where a package is missing that is needed only after a while."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        parser.error(f"needs {', '.join(missing)}: pip install -e '.[dev]'")


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def versions(about: dict[str, Any]) -> str:
    """What `foveate.machine.environment` says of the software, as a phrase."""
    return ", ".join(f"{name} {about[name]}" for name in ("foveate", "torch", "transformers", "python"))
