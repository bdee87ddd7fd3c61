"""The files of a package's Triton repository, and their hashes in its manifest, which `foveate.load` does not open."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from foveate.errors import ArtifactError
from foveate.manifest import MANIFEST, read_manifest, sha256

FOLDER = "serving/triton"
KEY = "serving"
"""Where the manifest lists them."""


def place(source: Path, target: Path) -> int:
    """Link a file, or copy it where the file system links none; bytes that were copied."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        return source.stat().st_size
    return 0


def record(package: Path) -> None:
    """List the repository in the manifest of a package that is being written."""
    path = package / MANIFEST
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**manifest, KEY: _hashes(package)}, indent=2) + "\n", encoding="utf-8")


def check_files(package: Path) -> None:
    """Raise ArtifactError where the repository does not hold just the files that the manifest lists."""
    listed = read_manifest(package).get(KEY)
    if not isinstance(listed, dict):
        raise ArtifactError(f"{package} has no Triton repository: export it with --serving triton")
    root = package / FOLDER
    for path in (root.parent, root, *sorted(root.rglob("*"))):
        if path.is_symlink():
            raise ArtifactError(f"{path} is a link; it must be a file")
        if path.is_file() and path.relative_to(package).as_posix() not in listed:
            raise ArtifactError(f"{path} is not in {MANIFEST}, and Triton might load it: remove it")
    found = _hashes(package)
    for name, expected in listed.items():
        if name not in found:
            raise ArtifactError(f"{package}/{name} is missing")
        if found[name] != expected:
            raise ArtifactError(f"{package}/{name} is not the file that was written: its sha256 is not {MANIFEST}'s")


def _hashes(package: Path) -> dict[str, str]:
    """sha256 of every file of the repository, by its path in the package; what is linked is read once."""
    known: dict[tuple[int, int], str] = {}
    found = {}
    for path in sorted(p for p in (package / FOLDER).rglob("*") if p.is_file()):
        about = path.stat()
        key = about.st_dev, about.st_ino
        if key not in known:
            known[key] = sha256(path)
        found[path.relative_to(package).as_posix()] = known[key]
    return found
