"""Attention that reaches beyond a query's own place, or back over a window only, against the reference."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from foveate import ops
from foveate.kernels import attention as kernels
from foveate.kernels import counting, reference
from foveate.ops import PAD
from tests.kernels.prompts import Call, call, in_sequence, plain, real, scattered
from tests.kernels.test_gradients import gradients, trainable

LAYOUTS = ("vt:vt", "t:t", "v:vt", "t:vt", "s:s")
each = pytest.mark.parametrize("layout", LAYOUTS)


def seen_further(layout: str, orders: dict[str, Tensor], prefix: int, end: int | None, window: int) -> Call:
    """Arguments whose tokens from place `prefix` up to `end` all see that one; None: no reach is given."""
    arguments = call(layout, orders, (4, 2), prefix)
    if end is not None:
        inside = [(x >= prefix) & (x <= end) for x in arguments["q_order"]]
        arguments["reach"] = [torch.where(i, end, x) for i, x in zip(inside, arguments["q_order"], strict=True)]
    return {**arguments, "window": window}


def check(arguments: Call) -> None:
    expected, rows = reference.attention(**arguments), real(arguments)
    for block, few in ((4, 0), (256, 0), (256, 100)):
        with mock.patch.object(kernels, "BLOCK", block), mock.patch.object(kernels, "FEW_QUERIES", few):
            actual = kernels.attention(**arguments)
        assert actual.isfinite().all()
        torch.testing.assert_close(actual[rows], expected[rows], rtol=1e-5, atol=1e-5)


@each
@pytest.mark.parametrize("end", [None, 9, 3])
@pytest.mark.parametrize("window", [0, 1, 4, 100])
def test_whole_images_and_windows_equal_the_reference(layout: str, end: int | None, window: int) -> None:
    check(seen_further(layout, in_sequence(7, 8, 3), 3, end, window))
    scattered_orders = scattered(7, 8, torch.Generator().manual_seed(window))
    check(seen_further(layout, scattered_orders, -1, None if end is None else 15, window))


def test_a_query_sees_its_image_and_as_much_before_it_as_the_window_says() -> None:
    orders = torch.arange(8)[None]
    reach = torch.tensor([[0, 1, 5, 5, 5, 5, 6, 7]])
    seen = kernels.sees(orders, reach, orders, 3)[0]
    assert [row.nonzero().flatten().tolist() for row in seen] == [
        [0],
        [0, 1],
        [0, 1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5],
        [2, 3, 4, 5],
        [3, 4, 5],
        [4, 5, 6],
        [5, 6, 7],
    ]
    padded = torch.tensor([[0, PAD]])
    assert kernels.sees(padded, padded, padded, 3)[0].tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("extra", [{"reach": True}, {"window": 3}, {"reach": True, "window": 3}])
def test_gradients_are_those_of_the_reference(extra: dict[str, Any]) -> None:
    arguments = seen_further("vt:vt", in_sequence(5, 4, 2), 2, 6 if "reach" in extra else None, extra.get("window", 0))
    given = (*trainable(plain(arguments)[:8]), arguments.get("reach"), arguments["window"])
    weight = torch.randn(2, 9, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found, wanted = (gradients(function, given, weight) for function in (ops.attention, reference.attention))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_the_op_has_a_shape_without_values_and_counts_all_pairs() -> None:
    arguments = seen_further("vt:vt", in_sequence(20, 10, 2), 2, 21, 4)
    torch.library.opcheck(ops.attention, tuple(arguments.values()), test_utils=("test_schema", "test_faketensor"))
    assert counting.FLOPS["attention"](**arguments) == 4 * 2 * 4 * 8 * 30 * 30
    causal = {**arguments, "reach": None, "window": 0}
    assert counting.FLOPS["attention"](**causal) == 4 * 2 * 4 * 8 * 30 * 30
