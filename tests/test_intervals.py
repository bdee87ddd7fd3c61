"""Intervals: against worked figures, and that they hold what they should."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.intervals import Figure, ratio, share, wilson


def test_wilson_against_published_figures() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: Wilson's interval without correction.
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 400), st.data())
def test_wilson_holds_the_share_and_mirrors(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    low, high = wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1
    assert wilson(n - right, n) == pytest.approx((1 - high, 1 - low))
    # It solves |p - x| = z sqrt(x (1 - x) / n), which defines it.
    for end in (low, high):
        if 0 < end < 1:
            assert abs(right / n - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / n))


def test_of_nothing() -> None:
    assert share(0, 0) == ratio([]) == Figure(0, 0, 1)


def test_the_bootstrap_of_a_mean_is_near_the_normal_interval() -> None:
    marks = [0.0, 1 / 3, 2 / 3, 1.0] * 100
    found = ratio(marks)
    half = 1.96 * math.sqrt(5 / 36 / len(marks))  # the variance of the four values is 5/36
    assert found.value == pytest.approx(0.5)
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.006)
    assert ratio(marks) == found, "the same seed gives the same interval"
    assert ratio(marks, seed=1) != found


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=12))
def test_a_ratio_is_that_of_the_sums(pairs: list[tuple[bool, bool]]) -> None:
    parts, wholes = [float(a and b) for a, b in pairs], [float(b) for _, b in pairs]
    found = ratio(parts, wholes)
    assert found.value == (sum(parts) / sum(wholes) if sum(wholes) else 0)
    assert 0 <= found.low <= found.high <= 1
