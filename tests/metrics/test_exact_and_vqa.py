"""Exact match and VQA accuracy against plain references."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.examples import Example, Question
from foveate.metrics import METRICS
from foveate.metrics.exact import plain
from foveate.metrics.vqa import CONTRACTIONS, canonical


def asked(*answers: str) -> Question:
    return Question(Example(""), answers)


@pytest.mark.parametrize(
    ("said", "answer", "exact", "verbatim"),
    [
        ("A red car.", "a red car", 1, 0),
        ("  red\n car ", "red car", 1, 0),
        ("Red-car", "redcar", 1, 0),
        ("the car", "car", 0, 0),
        ("3.5", "35", 0, 0),
        ("-3", "3", 0, 0),
        ("1,000.", "1000", 1, 0),
        ("+", "-", 0, 0),
        ("", "?", 0, 0),
        (" 7 empty 0 4 ", "7 empty 0 4", 1, 1),
    ],
)
def test_exact_and_verbatim(said: str, answer: str, exact: int, verbatim: int) -> None:
    assert METRICS["exact"].mark(said, asked("other", answer)) == exact
    assert METRICS["verbatim"].mark(said, asked("other", answer)) == verbatim


@given(st.text())
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert plain(plain(text)) == plain(text)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("The  Red Car.", "red car"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("were", "were"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("red/blue", "red blue"),
        ("yes, it is!", "yes it is"),
        ("(left)", "left"),
        ("t-shirt", "t shirt"),
        ("an", ""),
    ],
)
def test_canonical_answers(text: str, meant: str) -> None:
    assert canonical(text) == meant


def test_no_contraction_is_another_word() -> None:
    assert not {"were", "well", "its", "ill", "shell", "hell", "wed", "id", "shed"} & set(CONTRACTIONS)
    assert CONTRACTIONS["cant"] == "can't"


# What people said, and the mark of "red": 10 answers, as in the text of VQA's evaluation.
@pytest.mark.parametrize(("people", "mark"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_marks_of_ten_answers(people: int, mark: float) -> None:
    answers = ["Red."] * people + ["blue"] * (10 - people)
    assert METRICS["vqa"].mark("the red", asked(*answers)) == pytest.approx(mark)


@given(st.lists(st.sampled_from(["red", "blue", "green"]), min_size=2, max_size=11))
def test_vqa_is_the_mean_over_all_who_can_be_left_out(people: list[str]) -> None:
    needed = min(3, len(people) - 1)
    subsets = list(combinations(people, len(people) - 1))
    expected = sum(min(Fraction(others.count("red"), needed), 1) for others in subsets) / len(subsets)
    assert METRICS["vqa"].mark("red", asked(*people)) == pytest.approx(float(expected))


def test_vqa_of_one_answer_is_whether_it_is_that() -> None:
    assert [METRICS["vqa"].mark(said, asked("a car")) for said in ("car", "bus")] == [1, 0]


def test_figures_have_the_interval_that_suits_the_marks() -> None:
    questions = [asked("red"), asked("blue")] * 20
    said = ["red"] * 40
    exact, vqa = (METRICS[name].figures(said, questions)["accuracy"] for name in ("exact", "vqa"))
    assert exact.value == vqa.value == 0.5
    assert (exact.low, exact.high) == pytest.approx((0.3520, 0.6480), abs=1e-4), "Wilson's for 20 of 40"
    assert 0.3 < vqa.low < 0.4 and 0.6 < vqa.high < 0.7
