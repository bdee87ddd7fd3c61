"""From `--data` to examples: `digits`, a file of JSON lines, a folder with one, or a folder of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

from foveate.cli.errors import UseError
from foveate.cli.models import DIGITS
from foveate.cli.prompts import full_prompt
from foveate.errors import FoveateError
from foveate.examples import Example, check_image

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
KEYS = ("id", "image", "images", "prompt", "answer")
DESCRIBE = "Describe this image."
"""Asked of an image that has no question beside it."""


def read_examples(name: str, processor: Any, *, answers: bool = False, count: int | None = None) -> list[Example]:
    """The samples of --data, `count` at most; UseError names the file, the line and what is wrong there.

    A line of JSON is {"image": "a.png", "prompt": "...", "answer": "..."}; `image` is a path from the file's folder, a
    list of them, or left out. A folder holds one .jsonl file, or images, each with its prompt in a .txt of the same
    name. answers: every sample must have one.
    """
    path = Path(name).expanduser()
    if not path.exists():
        raise UseError(f"--data {name}: there is no such file or folder; give {DIGITS!r}, a folder, or a .jsonl file")
    if path.is_dir():
        inside = sorted(path.glob("*.jsonl"))
        if len(inside) > 1:
            raise UseError(f"--data {name} holds {len(inside)} .jsonl files; give one of them")
        if not inside:
            return _folder(path, processor, answers, count)
        path = inside[0]
    lines = enumerate(_text(path).splitlines(), 1)
    filled = ((number, line) for number, line in lines if line.strip())
    found = [_line(path, number, line, processor, answers) for number, line in islice(filled, count)]
    if not found:
        raise UseError(f"--data {name} holds no samples")
    return found


def _folder(path: Path, processor: Any, answers: bool, count: int | None) -> list[Example]:
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES and p.is_file())
    if not files or answers:
        wanted = "a .jsonl file with answers" if answers else "a .jsonl file, or images"
        raise UseError(f"--data {path} holds {len(files)} images and no .jsonl file; {wanted} should be there")
    notes = [file.with_suffix(".txt") for file in files[:count]]
    prompts = [_text(note).strip() if note.is_file() else DESCRIBE for note in notes]
    return [_example(processor, p, [file], "", str(file)) for p, file in zip(prompts, files, strict=False)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UseError(f"{path} cannot be read as text") from None


def _line(path: Path, number: int, line: str, processor: Any, answers: bool) -> Example:
    place = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UseError(f"{place}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UseError(f'{place}: an object {{"image", "prompt", "answer"}} is expected')
    if unknown := sorted(set(row) - set(KEYS)):
        raise UseError(f"{place}: unknown key {unknown[0]!r}; there are: {', '.join(KEYS)}")
    for key in ("prompt", *(["answer"] if answers else [])):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UseError(f"{place}: {key!r} is missing, or no text")
    given = row.get("image", row.get("images"))
    names = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(each, str) for each in names):
        raise UseError(f"{place}: 'image' must be a path, or a list of paths")
    files = [path.parent / Path(each).expanduser() for each in names]
    return _example(processor, row["prompt"], files, str(row.get("answer", "")).strip(), place)


def _example(processor: Any, question: str, files: Sequence[Path], answer: str, place: str) -> Example:
    try:
        for file in files:
            check_image(file)
        prompt = full_prompt(processor, question, len(files))
    except FoveateError as error:
        raise UseError(f"{place}: {error}".replace(" for each --image", " for each")) from None
    return Example(prompt, tuple(files), answer, place)


class DigitExamples(Sequence[Example]):
    """Fresh questions about fresh grids of training digits, drawn when they are wanted; a seed gives the same ones."""

    def __init__(self, number: int, seed: int) -> None:
        self.number, self.seed = number, seed

    def __len__(self) -> int:
        return self.number

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | Sequence[Example]:
        from foveate.models.digits import samples
        from foveate.models.digits.questions import TASKS

        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(self.number))]
        if not 0 <= place < self.number:
            raise IndexError(place)
        task = TASKS[place % len(TASKS)]
        (drawn,) = samples(split="train", task=task, n=1, seed=self.seed * self.number + place)
        return Example(drawn.prompt, (drawn.image,), drawn.answer, f"digits question {place}")
