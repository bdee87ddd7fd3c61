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


SIZES = st.tuples(st.integers(1, 4), st.integers(1, 5))


@settings(deadline=None, max_examples=40)
@given(
    rows=st.lists(st.lists(SIZES, max_size=3), min_size=1, max_size=3).filter(any),
    keep=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_diverse_scores_are_the_reference(rows: list[list[tuple[int, int]]], keep: float, seed: int) -> None:
    order, coords = coords_of(rows)
    x = torch.randn(*order.shape, 6, generator=torch.Generator().manual_seed(seed))
    found = scores.diverse_scores(x, order, coords, keep)
    torch.testing.assert_close(found, reference.diverse_scores(x, order, coords, keep))


def test_diverse_scores_pick_one_of_each_kind_first() -> None:
    order, coords = coords_of([[(4, 4)]])
    kinds = torch.eye(4)[torch.arange(16) // 4][None]
    found = scores.diverse_scores(kinds, order, coords, 0.25)
    assert (found > 0).nonzero()[:, 1].tolist() == [0, 4, 8, 12]
    torch.library.opcheck(ops.diverse_scores, (kinds, order, coords, 0.25), test_utils=CHECKS)
    assert scores.diverse_scores(kinds[:, :0], order[:, :0], coords[:, :0], 0.5).shape == (1, 0)


def test_equal_images_get_equal_shares() -> None:
    order, coords = coords_of([[(4, 4), (4, 4)]])
    x = torch.randn(1, 32, 8)
    index, _ = tokens.top_tokens(scores.diverse_scores(x, order, coords, 0.3), order, 0.3)
    assert [int((index < 16).sum()), int((index >= 16).sum())] == [5, 4], "floor(0.3 * 32) = 9"


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3).filter(any),
    keep=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_removed_before_is_the_reference(lengths: list[int], keep: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    whole = torch.full((len(lengths), max(lengths)), PAD)
    for row, length in enumerate(lengths):
        whole[row, :length] = torch.randperm(40, generator=draw)[:length].sort().values
    _, kept = tokens.top_tokens(torch.rand(whole.shape, generator=draw), whole, keep)
    asked = torch.randint(50, (len(lengths), 7), generator=draw)
    found = tokens.removed_before(asked, whole, kept)
    assert torch.equal(found, reference.removed_before(asked, whole, kept))
    assert int(found.min()) >= 0
    torch.library.opcheck(ops.removed_before, (asked, whole, kept), test_utils=CHECKS)


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
