"""What every metric is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from foveate.examples import Question
from foveate.intervals import Figure, ratio, share


class Metric:
    """Marks replies to questions."""

    name: ClassVar[str]
    """As it is chosen by."""

    shares: ClassVar[bool] = True
    """Whether a mark is 0 or 1, nothing between: their mean is then a share, with Wilson's interval."""

    def refusal(self, asked: Question) -> str:
        """Why replies to this question cannot be marked, as the end of a message; empty where they can."""
        return ""

    def mark(self, said: str, asked: Question) -> float:
        """0 for a wrong reply to 1 for a right one."""
        raise NotImplementedError

    def figures(self, said: Sequence[str], asked: Sequence[Question]) -> dict[str, Figure]:
        """Name -> figure over all replies; `accuracy`, the mean of marks, comes first."""
        marks = [self.mark(text, question) for text, question in zip(said, asked, strict=True)]
        return {"accuracy": share(round(sum(marks)), len(marks)) if self.shares else ratio(marks)}
