"""Accuracy: questions are asked in left-padded batches, answered greedily, and marked by a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from foveate.examples import Example, Question, batch_inputs
from foveate.intervals import Figure
from foveate.metrics import METRICS, Metric
from foveate.models.digits import Sample
from foveate.models.digits.evaluate import LONGEST_ANSWER

Tick = Callable[[str, int, int], None]
"""Told of progress: what is being done, how much is done, out of how much."""


def silent(label: str, done: int, total: int) -> None:
    """A `Tick` that tells nobody."""


@dataclass(frozen=True)
class Score:
    """Replies to a list of questions, the mark of each from 0 to 1, and the figures of all with their intervals."""

    said: tuple[str, ...]
    marks: tuple[float, ...]
    tasks: tuple[str, ...]
    figures: dict[str, Figure] = field(default_factory=dict)

    @property
    def right(self) -> tuple[bool, ...]:
        """Which replies are wholly right."""
        return tuple(mark == 1 for mark in self.marks)

    @property
    def accuracy(self) -> float:
        """Mean mark, 0 to 1: the share of right answers where a mark is 0 or 1."""
        return sum(self.marks) / len(self.marks) if self.marks else 0.0

    def by_task(self) -> dict[str, float]:
        """Mean mark of each task that was asked; empty where questions have no task."""
        groups: dict[str, list[float]] = {}
        for task, mark in zip(self.tasks, self.marks, strict=True):
            groups.setdefault(task, []).append(mark)
        return {task: sum(found) / len(found) for task, found in sorted(groups.items()) if task}

    def to_json(self) -> dict[str, Any]:
        """accuracy, n, by_task, the metric's other figures, and intervals: {figure: [low, high]}."""
        values = {name: figure.value for name, figure in self.figures.items()}
        intervals = {name: [figure.low, figure.high] for name, figure in self.figures.items()}
        told = {**values, "accuracy": self.accuracy, "n": len(self.marks), "by_task": self.by_task()}
        return {**told, "intervals": intervals}


def ask(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    *,
    new_tokens: int,
    batch: int = 32,
    tick: Tick = silent,
    label: str = "asking",
) -> Iterator[tuple[Sequence[Question], list[str]]]:
    """Ask a model, original or optimized, and yield each batch of questions with its replies, `new_tokens` at most.

    Raises InputError naming a question that does not fit the model.
    """
    for start in range(0, len(questions), batch):
        tick(label, start, len(questions))
        part = questions[start : start + batch]
        yield part, replies(model, processor, [question.example for question in part], new_tokens)
    tick(label, len(questions), len(questions))


def replies(model: Any, processor: Any, examples: Sequence[Example], new_tokens: int, **generation: Any) -> list[str]:
    """What a model says to one batch of prompts; generation: options of `generate`, which is greedy without them."""
    inputs = batch_inputs(model, processor, examples, new_tokens, padding_side="left")
    with torch.inference_mode():
        out = model.generate(**inputs, **{"do_sample": False, **generation}, max_new_tokens=new_tokens)
    fresh = out[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in processor.batch_decode(fresh, skip_special_tokens=True)]


def score(said: Sequence[str], questions: Sequence[Question], metric: Metric) -> Score:
    """Replies, marked."""
    marks = tuple(metric.mark(text, question) for text, question in zip(said, questions, strict=True))
    tasks = tuple(question.task for question in questions)
    return Score(tuple(said), marks, tasks, metric.figures(said, questions))


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    batch: int = 32,
    tick: Tick = silent,
    label: str = "asking",
) -> Score:
    """Ask a model, original or optimized, every digits sample's question; right is what is so word for word."""
    questions = digit_questions(samples)
    asked = ask(model, processor, questions, new_tokens=LONGEST_ANSWER, batch=batch, tick=tick, label=label)
    return score([text for _, texts in asked for text in texts], questions, METRICS["verbatim"])


def digit_questions(samples: Sequence[Sample]) -> list[Question]:
    """Samples of `digits` as questions, numbered from 1."""
    examples = [
        Example(s.prompt, (s.image,), s.answer, f"digits question {i}", s.question) for i, s in enumerate(samples, 1)
    ]
    return [
        Question(example, (example.answer,), id=str(number), task=sample.task)
        for number, (example, sample) in enumerate(zip(examples, samples, strict=True), 1)
    ]


def agreement(one: Score, other: Score) -> float:
    """Share of questions that both answer with the same words, right or wrong."""
    same = [a == b for a, b in zip(one.said, other.said, strict=True)]
    return sum(same) / len(same) if same else 0.0
