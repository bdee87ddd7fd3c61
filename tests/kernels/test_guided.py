"""Counts by rank: the rank itself, the room that is kept, and what fits in it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import ops
from foveate.kernels import guided
from foveate.ops import PAD
from tests.kernels.test_statistics import observed_call
from tests.oracle import guided as oracle

CHECKS = ("test_schema", "test_faketensor")
ROWS = [(2, 1, 4), (0, 2, 3), (5, 0, 1)]


def rank_call(copies: int = 0, rows: list[tuple[int, int, int]] = ROWS) -> tuple:
    """Every text token behind the images asks; so many of the first ones ask the same."""
    q, k, _, orders, _, _, _, scale = observed_call(rows, (3, 4), (4, 2))
    q[1][:, :, -1 - copies : -1] = q[1][:, :, -1:]
    chosen = guided.behind_images(orders[0], orders[1]).float()
    return q[1], k, orders[1], orders, chosen, scale


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_the_rank_is_that_of_the_raters_rows(copies: int) -> None:
    call = rank_call(copies)
    q, k, order, orders, chosen, scale = call
    found = guided.rater_rank(*call)
    rows = ops.attention_row(q, k, order, orders, scale).mean(1)
    expected = []
    for row in range(len(found)):
        asked = rows[row, chosen[row] > 0][:, orders[0][row] != PAD]
        expected.append(oracle.rank(asked) if asked.numel() else 0)
    assert found.tolist() == expected
    torch.library.opcheck(ops.rater_rank, call, test_utils=CHECKS)


def test_raters_that_ask_the_same_count_once() -> None:
    """With one head, equal queries see the same keys in the same proportions, whatever text they see besides."""
    q, k, _, orders, _, _, _, scale = observed_call([(2, 1, 5)], (3, 4), (1, 1))
    chosen = guided.behind_images(orders[0], orders[1]).float()
    whole = guided.rater_rank(q[1], k, orders[1], orders, chosen, scale)
    q[1][:, :, -3:] = q[1][:, :, -1:]
    assert whole.tolist() == [5]
    assert guided.rater_rank(q[1], k, orders[1], orders, chosen, scale).tolist() == [3]


def test_padding_changes_no_rank() -> None:
    together = guided.rater_rank(*rank_call())
    assert together.tolist() == [4, 3, 0]


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(0, 20),
    text=st.integers(1, 9),
    scale=st.floats(0.01, 1),
    recycle=st.booleans(),
    seed=st.integers(0, 99),
)
def test_what_stays_fits_in_the_room_that_is_kept(
    count: int, text: int, scale: float, recycle: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    order = torch.arange(count).repeat(3, 1)
    short = count // 2
    order[1, short:], order[2, :] = PAD, PAD
    sizes = [count, short, 0]
    rank = torch.tensor([int(torch.randint(0, min(n, text) + 1, (1,), generator=draw)) for n in sizes])
    scores, x = torch.rand(3, count, generator=draw), torch.randn(3, count, 4, generator=draw)
    call = (scores, order, x, rank, torch.arange(text).repeat(3, 1), scale, recycle)
    index, kept, weights = guided.rank_tokens(*call)
    for row, n in enumerate(sizes):
        gone = math.floor(scale * (n - int(rank[row])))
        ranked = sorted(range(n), key=lambda j: (-float(scores[row, j]), j))
        stay, rest = set(ranked[: n - gone]), ranked[n - gone :]
        best = sorted(rest[: 3 * len(rest) // 10 + 1])
        peaks = oracle.clusters(x[row, best], len(best) // 10 + 1) if recycle and best else {}
        real = (kept[row] != PAD).nonzero()[:, 0].tolist()
        assert real == list(range(len(real)))
        assert kept[row, real].tolist() == sorted(stay | {best[p] for p in peaks})
        assert torch.equal(index[row, real], kept[row, real])
        torch.testing.assert_close(weights[row, real].sum(1), torch.ones(len(real)))
    if count:
        torch.library.opcheck(ops.rank_tokens, call, test_utils=CHECKS)
