"""Which choice a reply names, and what yes and no make of precision and recall."""

from __future__ import annotations

from string import ascii_uppercase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.examples import Example, Question
from foveate.metrics import METRICS
from foveate.metrics.choice import chosen, place_of
from foveate.metrics.yes_no import says_yes, unclear

COLOURS = ("red", "dark red", "blue", "light green")


@pytest.mark.parametrize(
    ("reply", "place"),
    [
        ("C", 2),
        ("c", 2),
        ("(c)", 2),
        (" C.\n", 2),
        ("C. blue", 2),
        ("(C) blue", 2),
        ("C: it is blue", 2),
        ("Blue.", 2),
        ("The answer is B.", 1),
        ("answer: (d)", 3),
        ("Option A is wrong, so the answer is C", 2),
        ("It must be D I think", 3),
        ("A car that is blue", 2),
        ("a dark red one", 1),
        ("it is light  green", 3),
        ("red or blue", None),
        ("B or C", None),
        ("E", None),
        ("E. blue", 2),
        ("reddish", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_choice_that_a_reply_names(reply: str, place: int | None) -> None:
    assert chosen(reply, COLOURS) == place


@given(st.integers(2, 26), st.data())
def test_each_letter_names_its_choice_in_every_dress(count: int, data: st.DataObject) -> None:
    choices = [f"thing {number}" for number in range(count)]
    place = data.draw(st.integers(0, count - 1))
    letter = ascii_uppercase[place]
    for reply in (letter, letter.lower(), f"({letter})", f"{letter}.", f"{letter}) {choices[0]}", f"Answer: {letter}"):
        assert chosen(reply, choices) == place
    assert chosen(choices[place], choices) == place_of(choices[place], choices) == place_of(letter, choices) == place


def test_words_come_before_letters() -> None:
    assert chosen("B", ("A", "C", "B")) == place_of("B", ("A", "C", "B")) == 2


@given(st.text(max_size=30), st.lists(st.text(max_size=8), min_size=2, max_size=4))
def test_any_reply_names_one_or_none(reply: str, choices: list[str]) -> None:
    assert chosen(reply, choices) in (None, *range(len(choices)))


def test_marks_of_choices() -> None:
    metric = METRICS["choice"]
    question = Question(Example(""), ("C",), COLOURS)
    assert [metric.mark(said, question) for said in ("blue", "C", "B", "who knows")] == [1, 1, 0, 0]
    assert metric.refusal(question) == ""
    assert "--metric choice" in metric.refusal(Question(Example(""), ("C",)))


@pytest.mark.parametrize(
    ("reply", "yes", "vague"),
    [
        ("Yes", True, False),
        ("yes, there is a dog. No cat.", True, False),
        ("No.", False, False),
        ("There is not", False, False),
        ("There isn\N{RIGHT SINGLE QUOTATION MARK}t one", False, False),
        ("A dog", True, True),
        ("nothing", True, True),
        ("", True, True),
    ],
)
def test_yes_and_no(reply: str, yes: bool, vague: bool) -> None:
    assert (says_yes(reply), unclear(reply)) == (yes, vague)


def test_yes_no_figures_by_hand() -> None:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    said = ["yes"] * 4 + ["no"] * 6
    truth = ["Yes"] * 3 + ["no"] + ["yes"] * 2 + ["no"] * 4
    found = METRICS["yes-no"].figures(said, [Question(Example(""), (answer,)) for answer in truth])
    values = {name: figure.value for name, figure in found.items()}
    expected = {"accuracy": 0.7, "precision": 3 / 4, "recall": 3 / 5, "f1": 2 / 3, "yes_ratio": 0.4, "unclear": 0}
    assert list(values) == list(expected)
    assert values == pytest.approx(expected)
    assert all(figure.low <= figure.value <= figure.high for figure in found.values())


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_f1_is_the_harmonic_mean(pairs: list[tuple[bool, bool]]) -> None:
    def words(values: list[bool]) -> list[str]:
        return ["yes" if value else "no" for value in values]

    said, truth = words([a for a, _ in pairs]), words([b for _, b in pairs])
    found = METRICS["yes-no"].figures(said, [Question(Example(""), (answer,)) for answer in truth])
    precision, recall = found["precision"].value, found["recall"].value
    harmonic = 2 * precision * recall / (precision + recall) if precision + recall else 0
    assert found["f1"].value == pytest.approx(harmonic)
    assert found["accuracy"].value == sum(a == b for a, b in zip(said, truth, strict=True)) / len(pairs)


@pytest.mark.parametrize("answers", [("maybe",), ("yes", "no")])
def test_other_answers_are_refused(answers: tuple[str, ...]) -> None:
    assert "neither yes nor no" in METRICS["yes-no"].refusal(Question(Example(""), answers))
