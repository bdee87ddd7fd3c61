"""Scores by which tokens are chosen: each is its reference, and says what its fake promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import ops
from foveate.kernels import reference, scores, tokens
from foveate.ops import PAD

CHECKS = ("test_schema", "test_faketensor")


def coords_of(rows: list[list[tuple[int, int]]]) -> tuple[Tensor, Tensor]:
    """Orders and coordinates of batch rows, each a list of images of so many rows and columns."""
    lists, image = [], 0
    for sizes in rows:
        lists.append([])
        for height, width in sizes:
            lists[-1] += [(image, y, x) for y in range(height) for x in range(width)]
            image += 1
    width = max(map(len, lists))
    order = torch.full((len(rows), width), PAD)
    coords = torch.full((len(rows), width, 3), -1)
    for row, places in enumerate(lists):
        order[row, : len(places)] = torch.arange(len(places)) + 3
        coords[row, : len(places)] = torch.tensor(places, dtype=torch.int64).view(-1, 3)
    return order, coords


@pytest.mark.parametrize("grid", [(1, 1), (3, 5), (24, 24), (7, 16), (1, 300)])
def test_grid_scores_are_the_reference(grid: tuple[int, int]) -> None:
    _, coords = coords_of([[grid], [grid, grid], []])
    assert torch.equal(
        scores.grid_scores(coords)[coords[..., 0] >= 0], reference.grid_scores(coords)[coords[..., 0] >= 0]
    )
    torch.library.opcheck(ops.grid_scores, (coords,), test_utils=CHECKS)


def test_a_quarter_is_every_second_row_and_column_and_half_a_checkerboard() -> None:
    order, coords = coords_of([[(24, 24)]])
    for keep, kept in ((0.25, lambda y, x: y % 2 == x % 2 == 0), (0.5, lambda y, x: (y + x) % 2 == 0)):
        index, _ = tokens.top_tokens(scores.grid_scores(coords), order, keep)
        found = {tuple(place) for place in coords[0, index[0], 1:].tolist()}
        assert found == {(y, x) for y in range(24) for x in range(24) if kept(y, x)}


FEATURES = st.tuples(st.integers(1, 3), st.integers(1, 30), st.just(6))


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(shape=FEATURES, keep=st.floats(0.01, 1), seed=st.integers(0, 99))
def test_diverse_scores_are_the_reference(shape: tuple[int, int, int], keep: float, seed: int) -> None:
    x = drawn(shape, seed)
    torch.testing.assert_close(scores.diverse_scores(x, keep), reference.diverse_scores(x, keep))


def test_diverse_scores_of_more_tokens_than_a_block() -> None:
    x = drawn((2, 2 * scores.BLOCK + 3, 5), 1)
    torch.testing.assert_close(scores.diverse_scores(x, 0.01), reference.diverse_scores(x, 0.01))


def test_diverse_scores_pick_one_of_each_kind_first() -> None:
    kinds = torch.eye(4)[torch.arange(16) // 4][None]
    found = scores.diverse_scores(kinds, 0.25)
    assert (found > 0).nonzero()[:, 1].tolist() == [0, 4, 8, 12]
    torch.library.opcheck(ops.diverse_scores, (kinds, 0.25), test_utils=CHECKS)
    assert scores.diverse_scores(kinds[:, :0], 0.5).shape == (1, 0)


def test_two_tokens_nearest_to_each_other_tie() -> None:
    """Rounding must not decide between them: the first wins."""
    for seed in range(50):
        x = drawn((1, 2, 6), seed)
        assert scores.diverse_scores(x, 0.5).tolist() == [[1.0, 0.0]]


@settings(deadline=None, max_examples=40)
@given(shape=FEATURES, keep=st.floats(0, 1), important=st.floats(0, 1), seed=st.integers(0, 99))
def test_distinct_scores_are_the_reference(
    shape: tuple[int, int, int], keep: float, important: float, seed: int
) -> None:
    row, x = drawn(shape[:2], seed).softmax(1), drawn(shape, seed + 1)
    found = scores.distinct_scores(row, x, keep, important)
    assert torch.equal(found, reference.distinct_scores(row, x, keep, important))
    assert found.sum(1).tolist() == [math.floor(keep * shape[1])] * shape[0]


def test_fakes() -> None:
    torch.library.opcheck(ops.distinct_scores, (drawn((2, 9), 0), drawn((2, 9, 4), 1), 0.5, 0.5), test_utils=CHECKS)


def test_places() -> None:
    x = torch.zeros(2, 3, 5)
    assert torch.ops.foveate.places(x).tolist() == [[0, 1, 2]] * 2
    torch.library.opcheck(ops.places, (x,), test_utils=CHECKS)


@pytest.mark.parametrize("share", [0.1, 0.49, 0.5, 1.0])
def test_a_share_of_more_tokens_than_are_left(share: float) -> None:
    whole = torch.arange(20).repeat(2, 1)
    whole[1, 9:] = PAD
    left = torch.arange(0, 20, 2).repeat(2, 1)
    left[1, 5:] = PAD
    values = torch.rand(2, 10)
    found, expected = (f(values, left, share, whole) for f in (tokens.top_tokens, reference.top_tokens))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (found[1] != PAD).sum(1).tolist() == [min(10, math.floor(share * 20)), min(5, math.floor(share * 9))]
    torch.library.opcheck(ops.top_tokens, (values, left, share, whole), test_utils=CHECKS)
