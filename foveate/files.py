"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from foveate.errors import ArtifactError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file; ArtifactError where that fails, and then what was there before still is."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        part.unlink(missing_ok=True)
