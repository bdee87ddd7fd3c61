"""What models said, a line of JSON each, in a file that an interrupted run goes on from.

{"foveate": "eval", "model": "digits", "passes": ["fastv"], "data": "questions.jsonl", ...}
{"passes": null, "id": "1", "said": "a red car"}
{"passes": "fastv", "id": "1", "said": "a car"}

The first line says what was asked of whom; `passes` null is the model as it was. Marks are not kept, so the same
answers can be marked by another metric.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foveate.errors import ArtifactError, InputError
from foveate.examples import Question

KIND = {"foveate": "eval"}


class Answers:
    """Replies by passes and question; with a path each batch is written before the next is asked."""

    def __init__(self, about: Mapping[str, Any], path: Path | None = None, resume: bool = False) -> None:
        """about: what a run that is resumed must share with the one that began the file.

        Raises InputError where the file is of another run, or there and not to be resumed, ArtifactError where it
        is damaged or cannot be written.
        """
        self._said: dict[tuple[str | None, str], str] = {}
        self._path = path
        if path is None:
            return
        first = _line({**KIND, **about})
        check_free(path, resume)
        whole = self._read(path, first) if path.exists() else 0
        try:
            with path.open("ab") as file:
                file.truncate(whole)
        except OSError as error:
            raise _unwritten(path, error) from None
        if not whole:
            self._append(first)

    def get(self, passes: str | None, question: Question) -> str | None:
        """What was said, if it was."""
        return self._said.get((passes, question.id))

    def add(self, passes: str | None, questions: Sequence[Question], said: Sequence[str]) -> None:
        """Keep replies; ArtifactError where the file cannot be written."""
        pairs = list(zip((question.id for question in questions), said, strict=True))
        self._said |= {(passes, name): text for name, text in pairs}
        self._append(b"".join(_line({"passes": passes, "id": name, "said": text}) for name, text in pairs))

    def _append(self, lines: bytes) -> None:
        if self._path is None:
            return
        try:
            with self._path.open("ab") as file:
                file.write(lines)
        except OSError as error:
            raise _unwritten(self._path, error) from None

    def _read(self, path: Path, first: bytes) -> int:
        """Take in the answers of a file; how many of its bytes are whole lines."""
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
        whole = content.rfind(b"\n") + 1
        if not whole and first.startswith(content):
            return 0  # interrupted within its first line
        head, *rest = content[:whole].splitlines() or [b""]
        _check_same(path, _parsed(head), json.loads(first))
        for number, line in enumerate(rest, 2):
            row = _parsed(line)
            passes, name, said = (row.get(key) for key in ("passes", "id", "said"))
            if not (isinstance(passes, str | None) and isinstance(name, str) and isinstance(said, str)):
                raise ArtifactError(f"{path}, line {number}: no answer; mend or remove the line")
            self._said[passes, name] = said
        return whole


def check_free(path: Path, resume: bool) -> None:
    """Raise InputError where a file is in the way of answers and is not to be resumed."""
    if path.exists() and not resume:
        raise InputError(f"{path} exists already: go on with --resume if it holds answers, or give another file")


def digest(questions: Sequence[Question]) -> str:
    """What tells one list of questions from another: ids, prompts, and the sizes or pixels of images.

    Answers are left out: they may be mended without asking again.
    """
    told = hashlib.sha256()
    for question in questions:
        told.update(repr((question.id, question.example.prompt, len(question.example.images))).encode())
        for image in question.example.images:
            seen = repr((image.name, image.stat().st_size)).encode() if isinstance(image, Path) else image.tobytes()
            told.update(seen)
    return told.hexdigest()


def _check_same(path: Path, begun: dict[str, Any], now: dict[str, Any]) -> None:
    if any(begun.get(name) != value for name, value in KIND.items()):
        raise InputError(f"{path} is no file of answers that foveate eval began; give another file")
    for name, value in now.items():
        if begun.get(name) != value:
            what = name.replace("_", " ")
            was = "other questions" if name == "questions" else f"{what} {begun.get(name)!r}, not {value!r}"
            raise InputError(f"{path} was begun with {was}; ask the same, or give another file")


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"


def _unwritten(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"{path} cannot be written: {error.strerror or error}")
