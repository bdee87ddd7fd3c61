"""Questions of yes or no, where a model that always says yes must show."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

from foveate.examples import Question
from foveate.intervals import Figure, ratio, share
from foveate.metrics.base import Metric

_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def _words(said: str) -> list[str]:
    """Of the first sentence."""
    return _WORD.findall(said.lower().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").partition(".")[0])


def says_yes(said: str) -> bool:
    """Whether a reply counts as yes: its first sentence has neither "no" nor "not", nor a word such as "isn't"."""
    return not any(word in ("no", "not") or word.endswith("n't") for word in _words(said))


def unclear(said: str) -> bool:
    """Whether it counts as yes for lack of any word that says so."""
    return says_yes(said) and "yes" not in _words(said)


class YesNo(Metric):
    """Accuracy, precision, recall and F1 of saying yes, and how often it is said.

    A reply that says neither counts as yes, as in POPE; `unclear` is the share of those, and where it is large the
    other figures say little. Precision, recall and their harmonic mean are 0 where nothing is there to be divided by.

    Source: POPE (arXiv 2305.10355) and the rule of its evaluation, which takes words such as "isn't" for no denial.
    """

    name: ClassVar[str] = "yes-no"

    def refusal(self, asked: Question) -> str:
        """One answer is needed, yes or no."""
        answers = [answer.lower() for answer in asked.answers]
        return "" if answers in (["yes"], ["no"]) else f"the answer is {asked.answers[0]!r}, neither yes nor no"

    def mark(self, said: str, asked: Question) -> float:
        """1 or 0."""
        return float(says_yes(said) == (asked.answers[0].lower() == "yes"))

    def figures(self, said: Sequence[str], asked: Sequence[Question]) -> dict[str, Figure]:
        """accuracy, precision, recall, f1, yes_ratio, unclear."""
        yes = [says_yes(text) for text in said]
        truth = [question.answers[0].lower() == "yes" for question in asked]
        both = [a and b for a, b in zip(yes, truth, strict=True)]
        return {
            **super().figures(said, asked),
            "precision": share(sum(both), sum(yes)),
            "recall": share(sum(both), sum(truth)),
            # F1 = 2 TP / (2 TP + FP + FN), of which each question adds its part.
            "f1": ratio([2.0 * b for b in both], [float(a + b) for a, b in zip(yes, truth, strict=True)]),
            "yes_ratio": share(sum(yes), len(yes)),
            "unclear": share(sum(map(unclear, said)), len(said)),
        }
