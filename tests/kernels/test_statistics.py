"""What calibration counts, against the reference and against what must hold of any attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import foveate.kernels  # noqa: F401  registers the ops
from foveate import ops
from foveate.kernels import reference, statistics
from foveate.ops import PAD
from tests.kernels.prompts import HEADS, SCALE, SIZE

Call = tuple[Any, ...]


def observed_call(
    rows: list[tuple[int, int, int]],
    grid: tuple[int, int],
    heads: tuple[int, int] = (4, 2),
    distances: int = 5,
    dtype: torch.dtype = torch.float32,
) -> Call:
    """Arguments for prompts of (prefix text, images, later text) a row, one text token between two images."""
    generator = torch.Generator().manual_seed(len(rows) + distances)
    tokens = grid[0] * grid[1]
    visual, text, coords = [], [], []
    number = 0
    for before, images, later in rows:
        place, mine, others, where = before, [], list(range(before)), []
        for image in range(images):
            if image:
                others.append(place)
                place += 1
            mine += range(place, place + tokens)
            where += [[number, i // grid[1], i % grid[1]] for i in range(tokens)]
            place, number = place + tokens, number + 1
        visual.append(mine)
        coords.append(where)
        text.append(others + list(range(place, place + later)))
    most = [max(map(len, stream)) for stream in (visual, text)]
    v_order = torch.tensor([row + [PAD] * (most[0] - len(row)) for row in visual], dtype=torch.int64)
    t_order = torch.tensor([[PAD] * (most[1] - len(row)) + row for row in text], dtype=torch.int64)
    places = torch.tensor([row + [[-1] * 3] * (most[0] - len(row)) for row in coords], dtype=torch.int64)
    orders = [v_order.view(len(rows), most[0]), t_order.view(len(rows), most[1])]

    def random(count: int, number: int) -> Tensor:
        return torch.randn(len(rows), count, number, SIZE, generator=generator).to(dtype)

    q, k = ([random(count, x.shape[1]) for x in orders] for count in heads)
    out = [random(heads[0], x.shape[1]).transpose(1, 2) for x in orders]
    return q, k, out, orders, orders, places.view(len(rows), most[0], 3), distances, SCALE


def check(call: Call, tolerance: float = 1e-5) -> tuple[Tensor, ...]:
    found = ops.attention_statistics(*call)
    for actual, expected in zip(found, reference.attention_statistics(*call), strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    return tuple(found)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(
    "rows",
    [
        [(3, 1, 4)],
        [(0, 1, 1)],  # no text before the image
        [(2, 1, 4), (0, 2, 3), (5, 0, 1)],  # padding in both streams, two images, none
        [(4, 0, 2)],  # no image at all
    ],
    ids=["one", "no-prefix", "ragged", "text"],
)
def test_statistics_equal_the_reference(rows: list[tuple[int, int, int]], heads: tuple[int, int]) -> None:
    check(observed_call(rows, (3, 4), heads))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=3),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    heads=st.sampled_from(HEADS),
    distances=st.integers(1, 6),
)
def test_any_prompt_equals_the_reference(
    rows: list[tuple[int, int, int]], grid: tuple[int, int], heads: tuple[int, int], distances: int
) -> None:
    check(observed_call(rows, grid, heads, distances))


def test_more_queries_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK", 4)
    check(observed_call([(3, 2, 6), (1, 1, 2)], (3, 5)))


def test_bfloat16_is_near_the_reference() -> None:
    check(observed_call([(3, 1, 4)], (3, 4), dtype=torch.bfloat16), 5e-2)


def test_each_query_gives_one_unit_of_attention_and_every_pair_is_counted() -> None:
    mass, _, by_distance, pairs = check(observed_call([(3, 1, 4)], (3, 4), distances=9))
    torch.testing.assert_close(mass.sum(-1), torch.tensor([12.0, 7.0]).expand(1, 4, 2))
    torch.testing.assert_close(by_distance.sum(-1), mass[:, :, 0, 1])
    assert pairs.sum() == 12 * 13 / 2
    assert pairs[0, 0] == 12


def test_no_value_is_as_large_as_all_pairs() -> None:
    """The largest tensor grows with the tokens, not with their square."""

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            leaves = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            self.size = max([self.size, *(x.numel() for x in leaves)])
            return out

    sizes = []
    for side in (16, 32):
        with Largest() as seen:
            statistics.attention_statistics(*observed_call([(3, 1, 4)], (side, side), (2, 2)))
        sizes.append(seen.size)
    assert sizes[1] < 4.5 * sizes[0]
    assert sizes[1] < 32**4 / 2


def test_divergence_equals_the_reference_and_is_none_from_itself() -> None:
    p, q = torch.randn(2, 3, 1, 7, generator=torch.Generator().manual_seed(2)) * 5
    torch.testing.assert_close(ops.divergence(p, q), reference.divergence(p, q), rtol=1e-5, atol=1e-6)
    assert ops.divergence(p, p).abs().max() == 0
    assert (ops.divergence(p, q) > 0).all()


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_activity_is_the_mean_over_real_tokens(tokens: int) -> None:
    x = torch.randn(3, tokens, 6, generator=torch.Generator().manual_seed(1))
    order = torch.arange(tokens).repeat(3, 1)
    order[1, :1], order[2] = PAD, PAD
    found = ops.activity(x, order)
    torch.testing.assert_close(found, reference.activity(x, order))
    assert (found[2] == 0).all()
