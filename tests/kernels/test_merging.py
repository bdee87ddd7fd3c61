"""Merges as weights: each is its reference, and says what its fake promises."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import ops
from foveate.kernels import merging, reference
from tests.kernels.test_scores import CHECKS, drawn


@settings(deadline=None, max_examples=40)
@given(images=st.integers(1, 3), count=st.integers(1, 30), data=st.data(), seed=st.integers(0, 99))
def test_visionzip_is_the_reference(images: int, count: int, data: st.DataObject, seed: int) -> None:
    dominant = data.draw(st.integers(0, count))
    contextual = data.draw(st.integers(0, count - dominant))
    row, metric = drawn((images, count), seed).softmax(1), drawn((images, count, 5), seed + 1)
    weights, source = merging.visionzip(row, metric, dominant, contextual)
    expected = reference.visionzip(row, metric, dominant, contextual)
    torch.testing.assert_close(weights, expected[0])
    assert torch.equal(source, expected[1])


@settings(deadline=None, max_examples=60)
@given(
    images=st.integers(1, 3),
    count=st.integers(2, 40),
    keep=st.none() | st.floats(0.5, 1),
    plus=st.booleans(),
    neighbors=st.integers(0, 40),
    sharp=st.floats(0.1, 5),
    seed=st.integers(0, 99),
)
def test_prumerge_is_the_reference(
    images: int, count: int, keep: float | None, plus: bool, neighbors: int, sharp: float, seed: int
) -> None:
    row, metric = (sharp * drawn((images, count), seed)).softmax(1), drawn((images, count, 5), seed + 1)
    weights, source, kept = merging.prumerge(row, metric, keep, plus, neighbors)
    for image, (expected, places) in enumerate(reference.prumerge(row, metric, keep, plus, neighbors)):
        assert int(kept[image]) == len(places)
        assert source[image, : len(places)].tolist() == places
        torch.testing.assert_close(weights[image, : len(places)], expected)


def test_fakes() -> None:
    row, metric = drawn((2, 20), 1).softmax(1), drawn((2, 20, 5), 2)
    torch.library.opcheck(ops.visionzip, (row, metric, 6, 3), test_utils=CHECKS)
    for keep in (None, 0.5):
        torch.library.opcheck(ops.prumerge, (row, metric, keep, True, 4), test_utils=CHECKS)
