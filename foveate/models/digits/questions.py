"""The question grammar: three tasks, their words and their answers.

    lookup   which digit is at row 2 , column 3 ?     7          (or: empty)
    count    how many 7 are there ?                   2
    row      read row 3 .                             7 empty 0 4

Rows and columns are counted from 1. A cell that holds no digit, blank or cluttered, reads `empty`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

GRID = 4
"""Cells along one side of the image."""

EMPTY = "empty"
"""What a cell without a digit reads as."""

TASKS = ("lookup", "count", "row")

Grid = tuple[tuple[str, ...], ...]
"""Row-major cell readings: `GRID` rows of `GRID` strings, each a digit "0".."9" or `EMPTY`."""

_PROMPT = "USER: <image>\n{question} ASSISTANT:"
_LOOKUP = re.compile(r"which digit is at row ([1-4]) , column ([1-4]) \?")
_COUNT = re.compile(r"how many ([0-9]) are there \?")
_ROW = re.compile(r"read row ([1-4]) \.")


def prompt_for(question: str) -> str:
    """The full prompt, with one `<image>` placeholder, for one question."""
    return _PROMPT.format(question=question)


@dataclass(frozen=True)
class Question:
    """One question about a grid; indices count from 0 here and from 1 in words."""

    task: str
    row: int = -1
    column: int = -1
    digit: int = -1

    @property
    def text(self) -> str:
        """The question in words."""
        if self.task == "lookup":
            return f"which digit is at row {self.row + 1} , column {self.column + 1} ?"
        if self.task == "count":
            return f"how many {self.digit} are there ?"
        if self.task == "row":
            return f"read row {self.row + 1} ."
        raise ValueError(f"unknown task {self.task!r}; choose one of {', '.join(TASKS)}")

    def cells(self, grid: Grid) -> tuple[tuple[int, int], ...]:
        """(row, column) of the cells the answer is read from: one, those that match, or four."""
        if self.task == "lookup":
            return ((self.row, self.column),)
        if self.task == "row":
            return tuple((self.row, column) for column in range(GRID))
        places = ((row, column) for row in range(GRID) for column in range(GRID))
        return tuple((r, c) for r, c in places if grid[r][c] == str(self.digit))

    def answer(self, grid: Grid) -> str:
        """The right answer, its words joined by single spaces."""
        cells = self.cells(grid)
        if self.task == "count":
            return str(len(cells))
        return " ".join(grid[row][column] for row, column in cells)


def parse_question(text: str) -> Question:
    """The question that `text` asks; the inverse of `Question.text`."""
    if match := _LOOKUP.fullmatch(text):
        return Question("lookup", row=int(match[1]) - 1, column=int(match[2]) - 1)
    if match := _COUNT.fullmatch(text):
        return Question("count", digit=int(match[1]))
    if match := _ROW.fullmatch(text):
        return Question("row", row=int(match[1]) - 1)
    raise ValueError(f"not a question of this grammar: {text!r}")
