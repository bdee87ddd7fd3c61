"""Samples for calibration, from the words of a command line: `digits`, a folder of images, or JSON lines."""

from __future__ import annotations

import json
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.cli.errors import UseError
from foveate.cli.models import DIGITS
from foveate.cli.prompts import full_prompt, read_image

if TYPE_CHECKING:
    from PIL.Image import Image

    from foveate.calibrate import Example

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
DESCRIBE = "Describe this image."
"""Asked of an image that has no question beside it."""


def read_examples(name: str, processor: Any, count: int) -> list[Example]:
    """The first `count` samples of DATA; UseError says which line or file is wrong.

    `digits`: drawn from its training part. A folder: each image, with the prompt in the .txt of the same name. Else a
    file of JSON lines, {"image": "a.png", "prompt": "..."} or {"images": [...], ...}, paths from the file's folder.
    """
    if name == DIGITS:
        from foveate.calibrate import Example
        from foveate.models.digits import samples

        return [Example(s.prompt, [s.image], f"digits sample {i + 1}") for i, s in enumerate(samples("train", n=count))]
    path = Path(name).expanduser()
    if not path.exists():
        raise UseError(f"--data {name}: there is no such file or folder; give {DIGITS!r}, a folder, or a .jsonl file")
    found = _folder(path, processor, count) if path.is_dir() else _lines(path, processor, count)
    if not found:
        raise UseError(f"--data {name} holds no {'images' if path.is_dir() else 'samples'}")
    return found


def _folder(path: Path, processor: Any, count: int) -> list[Example]:
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES and p.is_file())
    found = []
    for file in files[:count]:
        note = file.with_suffix(".txt")
        try:
            question = note.read_text(encoding="utf-8").strip() if note.is_file() else DESCRIBE
        except (OSError, UnicodeDecodeError):
            raise UseError(f"{note} cannot be read as text") from None
        found.append(_example(question, [file], str(file), processor))
    return found


def _lines(path: Path, processor: Any, count: int) -> list[Example]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UseError(f"--data {path} cannot be read as text; give a file of JSON lines") from None
    numbered = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
    return [_line(path, number, line, processor) for number, line in islice(numbered, count)]


def _line(path: Path, number: int, line: str, processor: Any) -> Example:
    place = f"{path.name} line {number}"
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise UseError(f"{place}: not JSON: {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise UseError(f'{place}: needs "prompt", a text, beside "image", a path, or "images", a list of them')
    names = entry.get("images", [entry["image"]] if "image" in entry else [])
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise UseError(f'{place}: needs "image", a path, or "images", a list of them')
    files = [path.parent / Path(n).expanduser() for n in names]
    return _example(entry["prompt"], files, place, processor)


def _example(question: str, files: list[Path], place: str, processor: Any) -> Example:
    from foveate.calibrate import Example

    for file in files:
        if not file.is_file():
            raise UseError(f"{place}: there is no image {file}")
    try:
        prompt = full_prompt(processor, question, len(files))
    except UseError as error:
        raise UseError(f"{place}: {error}") from None
    return Example(prompt, [partial(_open, file, place) for file in files], place)


def _open(file: Path, place: str) -> Image:
    try:
        return read_image(str(file))
    except UseError as error:
        raise UseError(f"{place}: {error}") from None
