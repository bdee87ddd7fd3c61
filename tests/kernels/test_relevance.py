"""Relevance and determinants: each is its reference, and says what its fake promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import ops
from foveate.kernels import reference, relevance
from tests.kernels.test_scores import CHECKS, FEATURES, drawn


@settings(deadline=None, max_examples=40)
@given(shape=FEATURES, seed=st.integers(0, 99))
def test_relevance_is_the_reference(shape: tuple[int, int, int], seed: int) -> None:
    x, question = drawn(shape, seed), drawn((shape[0], shape[2]), seed + 1)
    found = relevance.relevance(x, question)
    torch.testing.assert_close(found, reference.relevance(x, question), rtol=1e-4, atol=1e-5)
    assert (found > 0).all() and (found <= 1).all()


@settings(deadline=None, max_examples=60)
@given(
    images=st.integers(1, 3),
    count=st.integers(1, 14),
    width=st.sampled_from([3, 8, 20]),
    keep=st.floats(0.01, 1),
    theta=st.none() | st.floats(0, 0.9),
    weighed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_determinant_scores_are_the_reference(images, count, width, keep, theta, weighed, seed) -> None:
    """Also where tokens are more than dimensions, so that the last picks add nothing."""
    x = drawn((images, count, width), seed)
    r = drawn((images, count), seed + 1).sigmoid() if weighed else None
    torch.testing.assert_close(
        relevance.determinant_scores(x, r, keep, theta), reference.determinant_scores(x, r, keep, theta)
    )


def test_of_equal_tokens_the_first_stands_for_all() -> None:
    kinds = torch.eye(4)[torch.arange(16) // 4][None]
    assert (relevance.determinant_scores(kinds, None, 0.25) > 0).nonzero()[:, 1].tolist() == [0, 4, 8, 12]
    r = torch.linspace(0.1, 1, 16)[None]
    assert relevance.determinant_scores(kinds, r, 0.25).argsort(1, descending=True)[0, :4].tolist() == [15, 11, 7, 3]
    # With nothing new left, the first of the rest.
    assert (relevance.determinant_scores(kinds, r, 0.4) > 0).nonzero()[:, 1].tolist() == [0, 1, 2, 3, 7, 11, 15]


@pytest.mark.parametrize("count", [0, 9])
def test_fakes(count: int) -> None:
    x = drawn((2, count, 4), 1)
    torch.library.opcheck(ops.relevance, (x, drawn((2, 4), 2)), test_utils=CHECKS)
    torch.library.opcheck(ops.determinant_scores, (x, drawn((2, count), 0).sigmoid(), 0.5, 0.3), test_utils=CHECKS)
    torch.library.opcheck(ops.determinant_scores, (x, None, 0.5), test_utils=CHECKS)
