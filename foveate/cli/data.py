"""From `--data` to examples: `digits`, a file of JSON lines, a folder with one, or a folder of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

from foveate.cli.errors import UseError
from foveate.cli.models import DIGITS
from foveate.cli.prompts import full_prompt
from foveate.errors import FoveateError
from foveate.examples import Example, check_image

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
KEYS = ("id", "image", "images", "prompt", "answer", "answers", "choices")
DESCRIBE = "Describe this image."
"""Asked of an image that has no question beside it."""


def read_examples(name: str, processor: Any, *, answers: bool = False, count: int | None = None) -> list[Example]:
    """The samples of --data, `count` at most; UseError names the file, the line and what is wrong there.

    A line of JSON is {"image": "a.png", "prompt": "...", "answer": "..."}; `image` is a path from the file's folder, a
    list of them, or left out. A folder holds one .jsonl file, or images, each with its prompt in a .txt of the same
    name. answers: every sample must have one.
    """
    path = find_lines(name)
    if path.is_dir():
        return _folder(path, processor, answers, count)
    needed = ("prompt", *(["answer"] if answers else []))
    return [example_of(row, processor) for row in read_rows(path, needed, count)]


@dataclass(frozen=True)
class Row:
    """A line of JSON: where it stands, the folder its images are named from, and what it says."""

    place: str
    folder: Path
    values: dict[str, Any]


def find_lines(name: str) -> Path:
    """The .jsonl file that --data names, or that lies in the folder it names; the folder where there is none."""
    path = _at_home(name)
    if not path.exists():
        raise UseError(f"--data {name}: there is no such file or folder; give {DIGITS!r}, a folder, or a .jsonl file")
    inside = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if len(inside) > 1:
        raise UseError(f"--data {name} holds {len(inside)} .jsonl files; give one of them")
    return inside[0] if inside else path


def read_rows(path: Path, needed: Sequence[str], count: int | None) -> list[Row]:
    """The lines of a file that are not empty, `count` at most; each key that is `needed` holds text."""
    lines = enumerate(_text(path).split("\n"), 1)  # other marks of a line's end may stand in JSON texts
    filled = ((number, line) for number, line in lines if line.strip())
    rows = [_row(path, number, line, needed) for number, line in islice(filled, count)]
    if not rows:
        raise UseError(f"--data {path} holds no samples")
    return rows


def _row(path: Path, number: int, line: str, needed: Sequence[str]) -> Row:
    place = f"{path}, line {number}"
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise UseError(f"{place}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UseError(f'{place}: an object {{"image", "prompt", "answer"}} is expected')
    if unknown := sorted(set(row) - set(KEYS)):
        raise UseError(f"{place}: unknown key {unknown[0]!r}; there are: {', '.join(KEYS)}")
    for key in needed:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UseError(f"{place}: {key!r} is missing, or no text")
    return Row(place, path.parent, row)


def example_of(row: Row, processor: Any) -> Example:
    """What a line says, its images looked at; UseError where they are none, or do not fit the prompt."""
    given = row.values.get("image", row.values.get("images"))
    names = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(each, str) for each in names):
        raise UseError(f"{row.place}: 'image' must be a path, or a list of paths")
    files = [row.folder / _at_home(each) for each in names]
    return _example(processor, row.values["prompt"], files, str(row.values.get("answer", "")).strip(), row.place)


def _folder(path: Path, processor: Any, answers: bool, count: int | None) -> list[Example]:
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in IMAGES and p.is_file())
    if not files or answers:
        wanted = "a .jsonl file with answers" if answers else "a .jsonl file, or images"
        raise UseError(f"--data {path} holds {len(files)} images and no .jsonl file; {wanted} should be there")
    notes = [file.with_suffix(".txt") for file in files[:count]]
    prompts = [_text(note).strip() if note.is_file() else DESCRIBE for note in notes]
    return [_example(processor, p, [file], "", str(file)) for p, file in zip(prompts, files, strict=False)]


def _at_home(name: str) -> Path:
    """A path whose `~` is the user's folder; of a user that is not there it is a name like any other."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        raise UseError(f"{path} cannot be read as text") from None


def _example(processor: Any, question: str, files: Sequence[Path], answer: str, place: str) -> Example:
    try:
        for file in files:
            check_image(file)
        prompt = full_prompt(processor, question, len(files))
    except FoveateError as error:
        raise UseError(f"{place}: {error}".replace(" for each --image", " for each")) from None
    return Example(prompt, tuple(files), answer, place, question)


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
        return Example(drawn.prompt, (drawn.image,), drawn.answer, f"digits question {place}", drawn.question)
