"""What a saved folder says of itself, and whether its files are those that were saved. Needs no torch.

`foveate.json` lists every other file with its sha256. Only names that are known here are ever opened, so a manifest
cannot point outside its folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from foveate.errors import ArtifactError, FoveateError

FORMAT = 1
MANIFEST = "foveate.json"
FILES = ("program.txt", "model.safetensors", "config.json", "generation_config.json")

GRAPHS = {
    "vision": "vision_encoder.onnx",
    "vision_rest": "vision_rest.onnx",
    "embed": "embed_tokens.onnx",
    "prefill": "decoder_prefill.onnx",
    "decode": "decoder_step.onnx",
}
"""Graphs that an exported package may have besides, and their files; its manifest says which."""


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a saved program, after every file's hash has been checked."""
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a folder")
    path = folder / MANIFEST
    if not path.is_file() or path.is_symlink():
        raise ArtifactError(f"{folder} was not saved by foveate: it has no {MANIFEST}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise ArtifactError(f"{path} has format {found!r}; this foveate reads format {FORMAT}")
    files, known = manifest.get("files"), (*FILES, *GRAPHS.values())
    if not isinstance(files, dict) or not set(FILES) <= set(files) <= set(known):
        raise ArtifactError(f"{path} must list these files: {', '.join(FILES)}, and no others but exported graphs")
    for name in (each for each in known if each in files):
        # Only these names are opened, so a manifest cannot point outside its folder.
        if not (folder / name).is_file() or (folder / name).is_symlink():
            raise ArtifactError(f"{folder}/{name} is missing")
        if sha256(folder / name) != files[name]:
            raise ArtifactError(f"{folder}/{name} is not the file that was saved: its sha256 does not match {MANIFEST}")
    return manifest


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever goes wrong while a file is read is that file's fault: one ArtifactError that names it."""
    try:
        yield
    except Exception as error:
        kind = "" if isinstance(error, (FoveateError, ValueError)) else f"{type(error).__name__}: "
        text = str(error).strip().splitlines() or ["no reason given"]
        raise ArtifactError(f"{path} is damaged: {kind}{text[0]}") from None


def sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
