"""Experts: each token gets what its own would give, computed by all of them for all tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from foveate import ops
from foveate.kernels import experts

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def drawn(rows: tuple[int, ...], count: int, width: int = 6, neurons: int = 4, seed: int = 0) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    shapes = ((*rows, width), (*rows, count), (count, 2 * neurons, width), (count, width, neurons))
    return [torch.randn(shape, generator=made, dtype=torch.float64) for shape in shapes]


def reference(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, chosen: int, activation: str) -> Tensor:
    """Every expert for every token, most of which count nothing."""
    likely = logits.float().softmax(-1)
    least = likely.sort(-1, descending=True).values[..., chosen - 1 : chosen]
    shares = likely * (likely >= least)
    shares = (shares / shares.sum(-1, keepdim=True)).to(x.dtype)
    act = {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_pytorch_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    }[activation]
    gate, up = torch.einsum("...d,end->...en", x, gate_up).chunk(2, dim=-1)
    return torch.einsum("...en,edn,...e->...d", act(gate) * up, down, shares)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.sampled_from([(1,), (7,), (2, 5), (3, 1), (2, 0), (0,)]),
    count=st.integers(1, 9),
    part=st.floats(0, 1),
    activation=st.sampled_from(ops.ACTIVATIONS),
    seed=st.integers(0, 99),
)
def test_experts_are_the_reference(rows: tuple[int, ...], count: int, part: float, activation: str, seed: int) -> None:
    chosen = max(1, round(part * count))
    arguments = drawn(rows, count, seed=seed)
    found = ops.experts(*arguments, chosen, activation)
    torch.testing.assert_close(found, reference(*arguments, chosen, activation), rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(counts=st.lists(st.integers(0, 5), min_size=1, max_size=6), seed=st.integers(0, 99))
def test_one_matmul_for_all_experts_is_one_for_each(counts: list[int], seed: int) -> None:
    """Experts that nobody chose among them, the first and the last too."""
    _, _, gate_up, down = (x.bfloat16() for x in drawn((1,), len(counts), 16, 8, seed))
    rows = torch.randn(sum(counts), 16, generator=torch.Generator().manual_seed(seed)).bfloat16()
    given = (rows, torch.tensor(counts), gate_up, down, functional.silu)
    torch.testing.assert_close(experts.grouped(*given), experts.one_by_one(*given), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("rows", [(5,), (2, 0)])
def test_gradients_are_the_reference_s(rows: tuple[int, ...]) -> None:
    """Those of weights that no token chose are zero, and those of the logits flow through the shares."""
    given = [x.requires_grad_() for x in drawn(rows, 8)]
    weight = torch.randn(given[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found, wanted = (
        torch.autograd.grad((function(*given, 2, "silu") * weight).sum(), given)
        for function in (ops.experts, reference)
    )
    for actual, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_what_is_said_of_it() -> None:
    torch.library.opcheck(ops.experts, (*drawn((2, 3), 4), 2, "gelu"), test_utils=CHECKS)
    with FlopCounterMode(display=False) as counter:
        ops.experts(*drawn((2, 3), 4), 2, "silu")
    assert counter.get_total_flops() == 6 * 2 * (3 * 2 * 6 * 4)


def test_autocast_takes_all_of_it() -> None:
    arguments = [x.float() for x in drawn((4,), 3)]
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.experts(*arguments, 1, "silu")
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, ops.experts(*(x.bfloat16() for x in arguments), 1, "silu"))
