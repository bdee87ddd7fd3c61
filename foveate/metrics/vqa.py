"""VQA accuracy: a reply is as right as people who were asked agree with it."""

from __future__ import annotations

import re
from typing import ClassVar

from foveate.examples import Question
from foveate.metrics.base import Metric

ENOUGH = 3
"""People whose agreement makes a reply right."""

ARTICLES = {"a", "an", "the"}

_NUMBER_WORDS = "zero one two three four five six seven eight nine ten"
NUMBERS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS.split())} | {"none": "0"}

_WITH_APOSTROPHE = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he's how'd how's i'm i've isn't
    it'll let's ma'am mightn't might've mustn't must've needn't o'clock oughtn't she's should've shouldn't somebody's
    someone's something's that'll that's there'd there's they'd they'll they're they've wasn't we've weren't what'll
    what's when's where's who'd who'll who's who've why's won't would've wouldn't y'all you'd you'll you're you've
"""
CONTRACTIONS = {word.replace("'", ""): word for word in _WITH_APOSTROPHE.split()}
"""Spelt without the apostrophe -> with it; those are left out that would be another word ("were", "well", "its")."""

_MARKS = r"""[;/\[\]"{}()=+\\_\-<>@`,?!]"""
_AT_AN_EDGE = re.compile(rf"{_MARKS}(?=\s|$)|(?<=\s){_MARKS}|^{_MARKS}|(?<=\d),(?=\d)")
_BETWEEN = re.compile(_MARKS)
_PERIOD = re.compile(r"\.(?!\d)")


def canonical(text: str) -> str:
    """An answer as it is compared: lower case, no articles, numbers to ten as digits, contractions with apostrophes.

    A punctuation mark at a word's edge goes, as does a comma within a number and every period but a decimal point; a
    mark between letters becomes a space.
    """
    bare = _PERIOD.sub("", _BETWEEN.sub(" ", _AT_AN_EDGE.sub("", text.lower().strip())))
    words = [NUMBERS.get(word, word) for word in bare.split() if word not in ARTICLES]
    return " ".join(CONTRACTIONS.get(word, word) for word in words)


class Vqa(Metric):
    """min(people who said it / 3, 1), averaged over all ways to leave one person out.

    `answers` are what people said, ten of them in VQA and TextVQA. Of fewer, the same is done: the average is over as
    many subsets as there are answers, and where fewer than three are left in a subset, all of them make a reply right.
    A single answer is compared as it is.

    Source: Antol et al., VQA (arXiv 1505.00468), and its evaluation, which averages over subsets of nine and
    normalises as `canonical` does. There, answers are compared as they are where all people agree; here they are
    always made canonical, on both sides.
    """

    name: ClassVar[str] = "vqa"
    shares: ClassVar[bool] = False

    def mark(self, said: str, asked: Question) -> float:
        """A share, in tenths of thirds for ten answers."""
        reply, people = canonical(said), [canonical(answer) for answer in asked.answers]
        same, n = people.count(reply), len(people)
        if n == 1:
            return float(same)
        needed = min(ENOUGH, n - 1)
        # One who said it is left out `same` times, one who did not in the other subsets.
        return (same * min(same - 1, needed) + (n - same) * min(same, needed)) / (n * needed)
