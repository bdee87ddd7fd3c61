"""From `--data` to questions whose replies can be marked; what is wrong with one is said before any is asked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.cli.data import Row, example_of, find_lines, read_rows
from foveate.cli.errors import UseError

if TYPE_CHECKING:
    from foveate.evaluate import Tick
    from foveate.examples import Question
    from foveate.metrics import Metric


def read_questions(name: str, processor: Any, count: int | None, tick: Tick) -> list[Question]:
    """The questions of a .jsonl file, or of a folder with one; UseError names file, line and what is wrong there.

    A line is {"image" or "images", "prompt", "answer" or "answers": [...]}, and may have "choices": [...] and an "id".
    """
    path = find_lines(name)
    if path.is_dir():
        raise UseError(f"--data {name} holds no .jsonl file; one with prompts and answers should be there")
    rows = read_rows(path, ("prompt",), count)
    questions = [_question(row, processor) for row in rows]
    _check_ids(questions)
    _check_images(questions, tick)
    return questions


def check_metric(metric: Metric, questions: Sequence[Question]) -> None:
    """UseError naming the first question whose reply this metric cannot mark."""
    for question in questions:
        if why := metric.refusal(question):
            raise UseError(f"{question.example.where}: {why}")


def _question(row: Row, processor: Any) -> Question:
    from foveate.examples import Question
    from foveate.metrics.choice import MOST, place_of
    from foveate.metrics.exact import plain

    answers, choices = _answers(row), _texts(row, "choices") if "choices" in row.values else ()
    if choices and not 2 <= len(set(map(plain, choices))) == len(choices) <= MOST:
        raise UseError(f"{row.place}: 'choices' must be 2 to {MOST} that differ by more than case and punctuation")
    for answer in answers if choices else ():
        if place_of(answer, choices) is None:
            raise UseError(f"{row.place}: the answer {answer!r} is none of the choices: {', '.join(choices)}")
    name = row.values.get("id", row.place.rpartition(", ")[2])
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise UseError(f"{row.place}: 'id' must be text or a whole number")
    return Question(example_of(row, processor), answers, choices, str(name))


def _answers(row: Row) -> tuple[str, ...]:
    given = [key for key in ("answer", "answers") if key in row.values]
    if len(given) != 1:
        raise UseError(f"{row.place}: {'give one of' if given else 'there is neither'} 'answer' or 'answers'")
    return _texts(row, given[0])


def _texts(row: Row, key: str) -> tuple[str, ...]:
    """One text or a list of them, none empty; one alone only under a singular key."""
    given = row.values[key]
    texts = [given] if key == "answer" else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UseError(f"{row.place}: {key!r} must be {'text' if key == 'answer' else 'a list of texts'}, not empty")
    return tuple(text.strip() for text in texts)


def _check_ids(questions: Sequence[Question]) -> None:
    first: dict[str, Question] = {}
    for question in questions:
        before = first.setdefault(question.id, question)
        if before is not question:
            raise UseError(f"{question.example.where}: the id {question.id!r} is that of {before.example.where} too")


def _check_images(questions: Sequence[Question], tick: Tick) -> None:
    """Read every image once: one that is cut short would else be met in the middle of the work."""
    from foveate.errors import InputError
    from foveate.examples import open_image

    users = {image: q for q in reversed(questions) for image in q.example.images if isinstance(image, Path)}
    for done, (image, question) in enumerate(users.items()):
        tick("looking at the images", done, len(users))
        try:
            open_image(image)
        except InputError as error:
            raise UseError(f"{question.example.where}: {error}") from None
