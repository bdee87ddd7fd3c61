"""Multiple choice: the reply names one of the choices, by its letter or its words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from string import ascii_uppercase
from typing import ClassVar

from foveate.examples import Question
from foveate.metrics.base import Metric
from foveate.metrics.exact import plain

MOST = len(ascii_uppercase)
"""Choices that have a letter."""

_WHOLE = re.compile(r"\W*([A-Za-z])\W*")
_START = re.compile(r"\s*(?:\(([A-Za-z])\)|([A-Z])[.):,])")
_SAID = re.compile(r"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([A-Z])\b", re.IGNORECASE)
_ALONE = re.compile(r"\(([A-Z])\)|\b([B-HJ-Z])\b")


def place_of(answer: str, choices: Sequence[str]) -> int | None:
    """Which choice an answer of the data is: by its words, else by its letter; None where it is none."""
    words = [plain(choice) for choice in choices]
    if plain(answer) in words:
        return words.index(plain(answer))
    return _placed([answer.strip()], len(choices))


def chosen(reply: str, choices: Sequence[str]) -> int | None:
    """Which choice a reply names, from 0, or None: nothing is guessed. The first of these that names one decides.

    1. The reply is the words of a choice, by `exact.plain`.
    2. It is a letter, or begins with one in brackets or before one of `. ) : ,`: "B", "(b)", "B. A red car".
    3. "answer is B", "answer: B", "option B": the last of them.
    4. The one letter that stands alone in it, in capitals; "A" and "I", which are words, only in brackets.
    5. The one choice whose words it holds; of two, the one within the other does not count ("red" in "dark red").
    """
    words = [plain(choice) for choice in choices]
    if (whole := plain(reply)) in words:
        return words.index(whole)
    at_start = _WHOLE.fullmatch(reply) or _START.match(reply)
    named = [group for group in at_start.groups() if group] if at_start else []
    for letters in (named, [match[1] for match in _SAID.finditer(reply)][-1:]):
        if (place := _placed(letters, len(choices))) is not None:
            return place
    alone = {group for match in _ALONE.finditer(reply) for group in match.groups() if group}
    if (place := _placed(sorted(alone & set(ascii_uppercase[: len(choices)])), len(choices))) is not None:
        return place
    held = [word for word in words if _holds(whole, word)]
    longest = [word for word in held if not any(word != other and _holds(other, word) for other in held)]
    return words.index(longest[0]) if len(longest) == 1 else None


def _placed(letters: Sequence[str], count: int) -> int | None:
    """The choice of the one letter that is given."""
    if len(letters) != 1 or len(letters[0]) != 1:
        return None
    place = ascii_uppercase.find(letters[0].upper())
    return place if 0 <= place < count else None


def _holds(text: str, words: str) -> bool:
    return f" {words} " in f" {text} "


class Choice(Metric):
    """1 where the reply names the right choice, and 0 where it names another, or none.

    Source: the heuristic matching of MMBench (arXiv 2307.06281): the letter is looked for, then the words. There a
    language model, and in MMMU (arXiv 2311.16502) chance, decides about replies that name none; here they are wrong.
    """

    name: ClassVar[str] = "choice"

    def refusal(self, asked: Question) -> str:
        """Choices are needed."""
        return "" if asked.choices else "there are no 'choices', which --metric choice needs"

    def mark(self, said: str, asked: Question) -> float:
        """1 or 0."""
        right = {place_of(answer, asked.choices) for answer in asked.answers}
        place = chosen(said, asked.choices)
        return float(place is not None and place in right)
