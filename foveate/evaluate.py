"""Accuracy on the digits tasks: greedy answers in left-padded batches, right if word for word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.models.digits import Sample
from foveate.models.digits.evaluate import answers

Tick = Callable[[str, int, int], None]
"""Told of progress: what is being done, how much is done, out of how much."""


def silent(label: str, done: int, total: int) -> None:
    """A `Tick` that tells nobody."""


@dataclass(frozen=True)
class Score:
    """Answers to a list of samples, and which of them are exactly right."""

    said: tuple[str, ...]
    right: tuple[bool, ...]
    tasks: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return sum(self.right) / len(self.right) if self.right else 0.0

    def by_task(self) -> dict[str, float]:
        """Share of right answers of each task that was asked."""
        groups: dict[str, list[bool]] = {}
        for task, right in zip(self.tasks, self.right, strict=True):
            groups.setdefault(task, []).append(right)
        return {task: sum(found) / len(found) for task, found in sorted(groups.items())}

    def to_json(self) -> dict[str, Any]:
        """accuracy, n, by_task."""
        return {"accuracy": self.accuracy, "n": len(self.right), "by_task": self.by_task()}


def evaluate(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    *,
    batch: int = 32,
    tick: Tick = silent,
    label: str = "asking",
) -> Score:
    """Ask a model, original or optimized, every sample's question."""
    said: list[str] = []
    for start in range(0, len(samples), batch):
        tick(label, start, len(samples))
        said += answers(model, processor, samples[start : start + batch], batch)
    tick(label, len(samples), len(samples))
    right = tuple(text == sample.answer for text, sample in zip(said, samples, strict=True))
    return Score(tuple(said), right, tuple(sample.task for sample in samples))


def agreement(one: Score, other: Score) -> float:
    """Share of samples that both answer with the same words, right or wrong."""
    same = [a == b for a, b in zip(one.said, other.said, strict=True)]
    return sum(same) / len(same) if same else 0.0
