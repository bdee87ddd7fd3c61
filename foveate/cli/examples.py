"""From `--data` to examples: a JSONL file of {"image", "prompt", "answer"}, a folder with one, or `digits`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from foveate.cli.errors import UseError
from foveate.cli.models import DIGITS
from foveate.cli.prompts import full_prompt

if TYPE_CHECKING:
    from foveate.train import Example

KEYS = {"image", "images", "prompt", "answer"}


def read_examples(name: str, processor: Any) -> list[Example]:
    """Every line of a JSONL file as an example; UseError names the file, the line and what is wrong with it.

    `image` is a path, relative to the file, or a list of them, or left out. Blank lines are skipped.
    """
    path = _jsonl(name)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UseError(f"{path} cannot be read: {error}") from None
    found = [_example(path, number, line, processor) for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise UseError(f"{path} holds no example")
    return found


def _jsonl(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        inside = sorted(path.glob("*.jsonl"))
        if len(inside) != 1:
            raise UseError(f"{name} holds {len(inside)} .jsonl files; give one of them, or a folder with one")
        return inside[0]
    if not path.is_file():
        raise UseError(f"there is no file or folder {name}; --data is a .jsonl file, a folder with one, or {DIGITS}")
    return path


def _example(path: Path, number: int, line: str, processor: Any) -> Example:
    from foveate.train import Example

    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UseError(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise UseError(f'{where}: an object {{"image", "prompt", "answer"}} is expected')
    if unknown := sorted(set(row) - KEYS):
        raise UseError(f"{where}: unknown key {unknown[0]!r}; there are: image, prompt, answer")
    for key in ("prompt", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UseError(f"{where}: {key!r} is missing, or no text")
    given = row.get("image", row.get("images"))
    names = [] if given is None else given if isinstance(given, list) else [given]
    images = tuple(_image(path, where, each) for each in names)
    try:
        prompt = full_prompt(processor, row["prompt"], len(images))
    except UseError as error:
        raise UseError(f"{where}: {error}".replace(" for each --image", " for each")) from None
    return Example(images, prompt, row["answer"].strip(), where)


def _image(path: Path, where: str, name: Any) -> Path:
    """An image that Pillow can at least identify; what lies behind its header is read when its turn comes."""
    from PIL import Image

    if not isinstance(name, str):
        raise UseError(f"{where}: 'image' must be a path, or a list of paths")
    image = path.parent / Path(name).expanduser()
    try:
        with Image.open(image):
            return image
    except FileNotFoundError:
        raise UseError(f"{where}: there is no image {image}") from None
    except Exception:  # Pillow's readers raise many kinds on damaged files
        raise UseError(f"{where}: {image} is not an image that Pillow can read") from None


class DigitExamples(Sequence["Example"]):
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
        from foveate.train import Example

        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(self.number))]
        if not 0 <= place < self.number:
            raise IndexError(place)
        task = TASKS[place % len(TASKS)]
        (drawn,) = samples(split="train", task=task, n=1, seed=self.seed * self.number + place)
        return Example((drawn.image,), drawn.prompt, drawn.answer, f"digits question {place}")
