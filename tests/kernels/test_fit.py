"""What visual tokens receive: the reference, in any prompt, with and without a window."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foveate import ops
from foveate.kernels import fit, reference
from foveate.ops import PAD
from tests.kernels.prompts import HEADS
from tests.kernels.test_statistics import observed_call

ROWS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 4)), min_size=1, max_size=3)


def calls(rows: list[tuple[int, int, int]], grid: tuple[int, int], heads: tuple[int, int]) -> list[tuple]:
    """From text, from visual tokens, and from visual tokens in windows of every kind."""
    q, k, _, orders, _, coords, _, scale = observed_call(rows, grid, heads)
    plain = [(q[1], k, orders[1], orders, True, scale), (q[0], k, orders[0], orders, False, scale)]
    windows = [(1, "chebyshev", False), (2, "euclidean", True), (3, "raster", False)]
    near = [(*plain[1], coords, *window) for window in windows]
    return [*plain, *near, (q[0], k[:1], orders[0], orders[:1], False, scale, coords, 1, "chebyshev", False)]


@settings(max_examples=25, deadline=None)
@given(rows=ROWS, grid=st.tuples(st.integers(1, 4), st.integers(1, 4)), heads=st.sampled_from(HEADS), data=st.data())
def test_any_prompt_equals_the_reference(rows, grid, heads, data) -> None:
    call = data.draw(st.sampled_from(calls(rows, grid, heads)))
    torch.testing.assert_close(fit.received_attention(*call), reference.received_attention(*call), rtol=1e-5, atol=1e-6)


def test_more_queries_than_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "BLOCK", 4)
    for call in calls([(3, 2, 6), (1, 1, 2)], (3, 5), (4, 2)):
        torch.testing.assert_close(fit.received_attention(*call), reference.received_attention(*call))


def test_one_head_gives_each_query_s_unit_away() -> None:
    q, k, _, orders, _, _, _, scale = observed_call([(0, 1, 3)], (3, 4), (1, 1))
    found = fit.received_attention(q[0], k[:1], orders[0], orders[:1], False, scale)
    torch.testing.assert_close(found.sum(1), torch.ones(1))


def test_where_nobody_asks_nothing_is_received() -> None:
    q, k, _, orders, _, _, _, scale = observed_call([(2, 1, 2)], (2, 2))
    assert not fit.received_attention(q[1][:, :, :2], k, orders[1][:, :2], orders, True, scale).any()
    pads = [torch.full_like(orders[0], PAD), orders[1]]
    assert not fit.received_attention(q[0], k, pads[0], pads, False, scale).any()
    assert not fit.received_attention(q[1], k, orders[1], pads, True, scale).any()


def test_fakes() -> None:
    for call in calls([(2, 1, 4), (0, 2, 3)], (3, 2), (4, 2)):
        torch.library.opcheck(ops.received_attention, call, test_utils=("test_schema", "test_faketensor"))


def test_no_value_is_as_large_as_all_pairs() -> None:
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            leaves = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
            self.size = max([self.size, *(x.numel() for x in leaves)])
            return out

    for which in (1, 2):
        sizes = []
        for side in (16, 32):
            call = calls([(3, 1, 4)], (side, side), (2, 2))[which]
            with Largest() as seen:
                fit.received_attention(*call)
            sizes.append(seen.size)
        assert sizes[1] < 4.5 * sizes[0]
        assert sizes[1] < 32**4 / 2
