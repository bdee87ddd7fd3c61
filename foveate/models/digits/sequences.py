"""Training sequences: one image, then many questions about it with their answers.

    <s> user: <image> x 144  q1 assistant: a1 </s>  user: q2 assistant: a2 </s>  ...

Only answers and the `</s>` behind them carry loss. A cell is asked about at most once in a sequence, and
counts come before any cell is read out, so no answer can be copied from an earlier answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from foveate.models.digits.data import PLAIN, STRONG, DigitSet, Pixels, Rng, compose
from foveate.models.digits.processing import VISUAL_TOKENS
from foveate.models.digits.questions import EMPTY, GRID, Grid, Question

NO_LOSS = -100
"""The label that cross-entropy ignores."""

Draw = Callable[[Rng, Grid, bool], list[Question]]
"""Draws the questions of one sequence; the flag asks for reading order."""


@dataclass(frozen=True)
class Batch:
    """`pixels` [batch, 3, SIZE, SIZE] in -1..1; `ids`, `labels`, `places` [batch, length], padded right."""

    pixels: torch.Tensor
    ids: torch.Tensor
    labels: torch.Tensor
    places: torch.Tensor


def draw_rows(rng: Rng, grid: Grid, raster: bool) -> list[Question]:
    """All four rows, from top to bottom or shuffled: the most answers for the fewest question words."""
    order = range(GRID) if raster else rng.permutation(GRID)
    return [Question("row", row=int(row)) for row in order]


def draw_many(rng: Rng, grid: Grid, raster: bool, counts: int) -> list[Question]:
    """Up to `counts` counting questions, then two rows cell by cell, the others whole or not at all."""
    questions = draw_counts(rng, grid, int(rng.integers(counts + 1)))
    by_cell = set(rng.choice(GRID, size=2, replace=False).tolist())
    readings: list[Question] = []
    for row in range(GRID):
        if row in by_cell:
            readings.extend(Question("lookup", row=row, column=column) for column in range(GRID))
        elif rng.random() < 0.5:
            readings.append(Question("row", row=row))
    if not raster:
        readings = [readings[index] for index in rng.permutation(len(readings))]
    return questions + readings


def draw_one(rng: Rng, grid: Grid, raster: bool) -> list[Question]:
    """One question of a random task, as evaluation asks it."""
    task = rng.integers(3)
    if task == 0:
        return [Question("lookup", row=int(rng.integers(GRID)), column=int(rng.integers(GRID)))]
    if task == 1:
        return [Question("row", row=int(rng.integers(GRID)))]
    return draw_counts(rng, grid, 1)


def draw_counts(rng: Rng, grid: Grid, counts: int) -> list[Question]:
    """`counts` counting questions about different digits, three in four about a digit that is there."""
    present = sorted({int(cell) for line in grid for cell in line if cell != EMPTY})
    absent = [digit for digit in range(10) if digit not in present]
    picked: list[int] = []
    for _ in range(min(counts, 10)):
        pool = present if (rng.random() < 0.75 and present) or not absent else absent
        picked.append(pool.pop(int(rng.integers(len(pool)))))
    return [Question("count", digit=digit) for digit in picked]


@dataclass(frozen=True)
class Encoded:
    """One sequence: `ids`, and for each token `labels` (itself where it answers) and `places`.

    A place is the number, `row * GRID + column`, of the one cell that an answer token is read from.
    """

    ids: list[int]
    labels: list[int]
    places: list[int]


def encode(questions: Sequence[Question], grid: Grid, words: Mapping[str, int]) -> Encoded:
    """The sequence of all questions with their answers; `words` is the tokenizer's vocabulary."""
    ids = [words["<s>"], words["user:"]] + [words["<image>"]] * VISUAL_TOKENS
    labels = [NO_LOSS] * len(ids)
    places = [NO_LOSS] * len(ids)
    for turn, question in enumerate(questions):
        lead = ["user:"] if turn else []
        asked = [words[word] for word in (*lead, *question.text.split(), "assistant:")]
        answered = [words[word] for word in (*question.answer(grid).split(), "</s>")]
        read = [row * GRID + column for row, column in question.cells(grid)]
        ids += asked + answered
        labels += [NO_LOSS] * len(asked) + answered
        places += [NO_LOSS] * len(asked)
        # A count is read from many cells or none, and `</s>` from none.
        places += [NO_LOSS] * len(answered) if question.task == "count" else [*read, NO_LOSS]
    return Encoded(ids, labels, places)


def to_tensor(pixels: Sequence[Pixels]) -> torch.Tensor:
    """Grey images [SIZE, SIZE] as the image processor would return them: [batch, 3, SIZE, SIZE], -1..1."""
    grey = torch.from_numpy(np.stack(pixels)).float() / 127.5 - 1
    return grey[:, None].expand(-1, 3, -1, -1).contiguous()


def draw_batch(rng: Rng, digits: DigitSet, words: Mapping[str, int], size: int, draw: Draw, ordered: float) -> Batch:
    """`size` fresh images with the questions that `draw` asks; a share of `ordered` in reading order."""
    images: list[Pixels] = []
    rows: list[Encoded] = []
    for index in range(size):
        pixels, grid = compose(rng, digits, STRONG if rng.random() < 0.7 else PLAIN)
        images.append(pixels)
        rows.append(encode(draw(rng, grid, index < ordered * size), grid, words))

    def padded(lists: list[list[int]], filler: int) -> torch.Tensor:
        length = max(len(row.ids) for row in rows)
        return torch.tensor([each + [filler] * (length - len(each)) for each in lists])

    return Batch(
        pixels=to_tensor(images),
        ids=padded([row.ids for row in rows], words["<pad>"]),
        labels=padded([row.labels for row in rows], NO_LOSS),
        places=padded([row.places for row in rows], NO_LOSS),
    )
