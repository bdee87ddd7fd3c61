"""The reply is an answer, word for word."""

from __future__ import annotations

import re
from typing import ClassVar

from foveate.examples import Question
from foveate.metrics.base import Metric

_OF_A_NUMBER = r"(?<=\d)\.(?=\d)|(?<!\w)-(?=\d)"
_DROPPED = re.compile(rf"(?!{_OF_A_NUMBER})[^\w\s]|_")


def plain(text: str) -> str:
    """Text in lower case, without punctuation marks, its words joined by single spaces.

    A decimal point and a minus sign stay, for 3.5 is not 35. Text that is nothing but marks stays as it is.
    """
    words = _DROPPED.sub("", text.lower()).split()
    return " ".join(words) or text.strip()


class Exact(Metric):
    """1 where the reply is one of the answers by `plain`.

    Source: `exact_match` of Hugging Face's evaluate with ignore_case and ignore_punctuation, by which lmms-eval marks
    GQA (arXiv 1902.09506). It differs in that marks within a number stay and white space counts as one space.
    """

    name: ClassVar[str] = "exact"

    def mark(self, said: str, asked: Question) -> float:
        """1 or 0."""
        return float(plain(said) in map(plain, asked.answers))


class Verbatim(Metric):
    """1 where the reply is one of the answers to the letter; white space around it aside. For `digits`."""

    name: ClassVar[str] = "verbatim"

    def mark(self, said: str, asked: Question) -> float:
        """1 or 0."""
        return float(said.strip() in asked.answers)
