"""Choosing tokens, gathering them, and random scores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import ops
from foveate.kernels import reference, tokens
from foveate.kernels.scores import random_scores
from foveate.ops import PAD

CHECKS = ("test_schema", "test_faketensor")


def ragged(lengths: list[int], generator: torch.Generator) -> Tensor:
    """Orders of rows with that many real tokens, at random columns, ascending."""
    width = max(lengths)
    order = torch.full((len(lengths), width), PAD)
    for row, length in enumerate(lengths):
        columns = torch.randperm(width, generator=generator)[:length].sort().values
        order[row, columns] = torch.randperm(width + 4, generator=generator)[:length].sort().values
    return order


def check_top(scores: Tensor, order: Tensor, keep: float) -> None:
    actual, expected = tokens.top_tokens(scores, order, keep), reference.top_tokens(scores, order, keep)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == torch.int64
        assert torch.equal(mine, theirs)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=4).filter(any),
    keep=st.floats(0.001, 1) | st.integers(1, 100).map(lambda p: p / 100),
    levels=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_top_tokens_equals_the_reference(lengths: list[int], keep: float, levels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = ragged(lengths, generator)
    # Few levels make many ties.
    check_top(torch.randint(levels, order.shape, generator=generator).float(), order, keep)


@pytest.mark.parametrize(("keep", "count"), [(0.29, 100), (0.57, 100), (0.58, 100), (0.1, 30), (0.7, 10), (1 / 3, 9)])
def test_top_tokens_keeps_as_many_as_python_floors(keep: float, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    order = ragged([count, count, count // 2], generator)
    scores = torch.rand(order.shape, generator=generator)
    index, _ = tokens.top_tokens(scores, order, keep)
    assert index.shape == (3, math.floor(keep * count))
    check_top(scores, order, keep)


def test_every_percentage_of_every_length_keeps_as_many_as_python_floors() -> None:
    for percent in range(1, 101):
        lengths = [576, 100, percent, 1]
        order = torch.full((4, 576), PAD)
        for row, length in enumerate(lengths):
            order[row, :length] = torch.arange(length)
        _, kept = tokens.top_tokens(torch.zeros(4, 576), order, percent / 100)
        expected = [math.floor(percent / 100 * length) for length in lengths]
        assert (kept != PAD).sum(1).tolist() == expected, percent


def test_top_tokens_prefers_the_lower_index_among_equals() -> None:
    scores = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0, 1.0]])
    index, kept = tokens.top_tokens(scores, torch.arange(6)[None] + 10, 0.5)
    assert index.tolist() == [[0, 1, 2]]
    assert kept.tolist() == [[10, 11, 12]]


def test_top_tokens_may_keep_none() -> None:
    index, kept = tokens.top_tokens(torch.rand(2, 3), torch.arange(3).repeat(2, 1), 0.2)
    assert index.shape == kept.shape == (2, 0)


def test_top_tokens_never_chooses_padding_by_its_score() -> None:
    order = torch.tensor([[PAD, 4, 5, 6], [1, 2, PAD, PAD]])
    scores = torch.tensor([[9.0, -1.0, -2.0, -3.0], [-5.0, -6.0, 9.0, 9.0]])
    index, kept = tokens.top_tokens(scores, order, 0.75)
    assert index.tolist() == [[1, 2, 0], [0, 0, 0]]
    assert kept.tolist() == [[4, 5, PAD], [1, PAD, PAD]]


def test_a_real_token_with_the_lowest_score_there_is_still_comes_before_padding() -> None:
    order = torch.tensor([[PAD, PAD, 5, 6]])
    check_top(torch.tensor([[0.0, 0.0, -math.inf, -math.inf]]), order, 1.0)


@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("count", [0, 4])
def test_take_tokens_gathers_along_every_axis(rank: int, single: bool, batch: int, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for dim in range(1, rank):
        shape = [1 if single else batch, 2, 3, 5][:rank]
        shape[dim] = 7
        x = torch.randn(shape, generator=generator)
        index = torch.randint(7, (batch, count), generator=generator)
        wide = x.expand(batch, *shape[1:])
        place = [1] * rank
        place[0], place[dim] = batch, count
        full = [*wide.shape]
        full[dim] = count
        expected = wide.gather(dim, index.view(place).expand(full))
        actual = tokens.take_tokens(x, index, dim)
        assert torch.equal(actual, expected)
        torch.library.opcheck(ops.take_tokens, (x, index, dim), test_utils=CHECKS)


@pytest.mark.parametrize("keep", [0.01, 0.29, 0.5, 1.0])
def test_top_tokens_and_random_scores_give_what_their_fakes_promise(keep: float) -> None:
    order = ragged([10, 3, 0], torch.Generator().manual_seed(0))
    torch.library.opcheck(ops.top_tokens, (torch.rand(3, 10), order, keep), test_utils=CHECKS)
    torch.library.opcheck(ops.random_scores, (order, 7), test_utils=CHECKS)


def test_random_scores_depend_on_the_place_in_the_stream_alone() -> None:
    short, long = torch.zeros(1, 10, dtype=torch.int64), torch.full((3, 300), PAD)
    a, b = random_scores(short, 5), random_scores(long, 5)
    assert torch.equal(a[0], b[0, :10])
    assert torch.equal(b[0], b[2])


def test_random_scores_of_two_seeds_differ() -> None:
    order = torch.zeros(1, 256, dtype=torch.int64)
    rows = torch.cat([random_scores(order, seed) for seed in range(20)])
    assert (torch.corrcoef(rows) - torch.eye(20)).abs().max() < 0.35
    kept = {tuple(tokens.top_tokens(row[None], order, 0.25)[0][0].tolist()) for row in rows}
    assert len(kept) == 20


def test_random_scores_are_roughly_uniform() -> None:
    order = torch.zeros(1, 4096, dtype=torch.int64)
    for seed in (0, 1, 2**31 - 1):
        scores = random_scores(order, seed)[0]
        assert scores.dtype == torch.float32
        assert scores.unique().numel() > 4000
        histogram = scores.histc(16, 0, 1)
        assert histogram.sum() == 4096
        assert (histogram - 256).abs().max() < 80


def seed_of_the_largest_hash() -> int:
    """The seed under which the first token's hash is 2**31 - 1, found by undoing the hash's steps."""
    mask = 2**31 - 1
    x = mask
    for multiplier in (0x119DE1F3, 0x297A2D39, 0x45D9F3B):
        x = x * pow(multiplier, -1, 2**31) & mask
        x ^= (x >> 15) ^ (x >> 30)
    return x


def test_random_scores_stay_below_one() -> None:
    seed = seed_of_the_largest_hash()
    scores = random_scores(torch.zeros(1, 1, dtype=torch.int64), seed)
    assert 0.99 < scores.item() < 1


@pytest.mark.parametrize("last", [0, 1, 5])
def test_residual_adds_the_rest_to_the_last_tokens_and_lets_gradients_through(last: int) -> None:
    x, y, rest = (torch.randn(2, n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 5, last))
    before = x.detach().clone()
    expected = torch.cat([(x + y)[:, : 5 - last], (x + y)[:, 5 - last :] + rest], 1)
    torch.testing.assert_close(ops.residual(x, y, rest), expected)
    assert torch.equal(x, before), "inputs are left as they are"
    torch.library.opcheck(ops.residual, (x, y, rest), test_utils=CHECKS)
    assert torch.autograd.gradcheck(ops.residual, (x, y, rest))
