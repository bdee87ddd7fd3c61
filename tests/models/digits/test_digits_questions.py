"""The question grammar and its answers."""

from __future__ import annotations

import pytest

from foveate.models.digits import parse_question, prompt_for, samples
from foveate.models.digits.questions import EMPTY, Grid, Question

GRID: Grid = (
    ("7", EMPTY, "0", "7"),
    ("1", "2", "3", "4"),
    (EMPTY, EMPTY, "7", "9"),
    ("5", "6", "8", "0"),
)

EVERY = [
    *(Question("lookup", row=row, column=column) for row in range(4) for column in range(4)),
    *(Question("count", digit=digit) for digit in range(10)),
    *(Question("row", row=row) for row in range(4)),
]


@pytest.mark.parametrize("question", EVERY, ids=lambda question: question.text)
def test_every_question_parses_back(question: Question) -> None:
    assert parse_question(question.text) == question


@pytest.mark.parametrize(
    ("text", "answer", "cells"),
    [
        ("which digit is at row 2 , column 3 ?", "3", ((1, 2),)),
        ("which digit is at row 3 , column 1 ?", EMPTY, ((2, 0),)),
        ("how many 7 are there ?", "3", ((0, 0), (0, 3), (2, 2))),
        ("how many 0 are there ?", "2", ((0, 2), (3, 3))),
        ("read row 1 .", "7 empty 0 7", ((0, 0), (0, 1), (0, 2), (0, 3))),
    ],
)
def test_answers_and_their_cells(text: str, answer: str, cells: tuple[tuple[int, int], ...]) -> None:
    question = parse_question(text)
    assert question.answer(GRID) == answer
    assert question.cells(GRID) == cells


@pytest.mark.parametrize("text", ["read row 5 .", "how many 12 are there ?", "read row 1", "hello", ""])
def test_what_the_grammar_does_not_hold_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a question"):
        parse_question(text)


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown task 'sum'"):
        _ = Question("sum").text
    with pytest.raises(ValueError, match="unknown task 'sum'"):
        samples(task="sum")


@pytest.mark.parametrize("task", ["lookup", "count", "row"])
def test_samples_agree_with_the_grammar(task: str) -> None:
    for sample in samples(task=task, n=30, seed=2):
        question = parse_question(sample.question)
        assert question.task == sample.task == task
        assert question.answer(sample.grid) == sample.answer
        assert question.cells(sample.grid) == sample.cells
        assert sample.prompt == prompt_for(sample.question)
        assert sample.prompt.count("<image>") == 1
