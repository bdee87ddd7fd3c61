"""What trained selections compute: each op is plain torch with explicit matrices, and so are its gradients."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from foveate import ops
from foveate.kernels import counting, learned
from foveate.ops import PAD
from tests.kernels import prompts
from tests.kernels.prompts import HEADS
from tests.oracle import learned as oracle

SIZE, SCALE = 6, 0.4


def in_sequence(visual: int, text: int, prefix: int) -> list[Tensor]:
    orders = prompts.in_sequence(visual, text, prefix)
    return [orders["v"], orders["t"]]


def scattered(visual: int, text: int, generator: torch.Generator, batch: int = 2) -> list[Tensor]:
    orders = prompts.scattered(visual, text, generator, batch)
    return [orders["v"], orders["t"]]


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weighted_case(orders: Any, heads: tuple[int, int], stream: int, weights: Tensor, seed: int = 0) -> tuple[Any, ...]:
    """Arguments of `weighted_attention`: queries of the visual (0) or of the text stream (1)."""
    batch, counts = len(orders[0]), [x.shape[1] for x in orders]
    q = noise(batch, heads[0], counts[stream], SIZE, seed=seed)
    k, v = ([noise(batch, heads[1], n, SIZE, seed=seed + i + 10 * j) for j, n in enumerate(counts)] for i in (1, 2))
    return q, k, v, orders[stream], list(orders), weights, SCALE


def decided(batch: int, count: int, seed: int = 0) -> Tensor:
    return (noise(batch, count, seed=seed) > 0).double()


def check_weighted(arguments: tuple[Any, ...]) -> None:
    q, k, v, q_order, k_order, weights, scale = arguments
    leaves = [x.clone().requires_grad_() for x in (q, *k, *v, weights)]
    rebuilt = (leaves[0], leaves[1:3], leaves[3:5], q_order, k_order, leaves[5], scale)
    real = (q_order != PAD)[:, :, None, None]
    out, expected = ops.weighted_attention(*rebuilt), oracle.weighted_attention(*rebuilt)
    torch.testing.assert_close(out * real, expected * real, rtol=1e-5, atol=1e-5)
    slope = noise(*out.shape, seed=5) * real
    found, wanted = (torch.autograd.grad((x * slope).sum(), leaves) for x in (out, expected))
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("block", [2, 256])
def test_weighted_attention_is_its_formula(heads: tuple[int, int], stream: int, block: int) -> None:
    with mock.patch.object(learned, "BLOCK", block):
        check_weighted(weighted_case(in_sequence(7, 9, 4), heads, stream, decided(2, 7)))
        padded = scattered(6, 8, torch.Generator().manual_seed(3))
        check_weighted(weighted_case(padded, heads, stream, decided(len(padded[0]), 6)))


@settings(deadline=None, max_examples=30)
@given(visual=st.integers(0, 9), text=st.integers(1, 9), stream=st.integers(0, 1), seed=st.integers(0, 99))
def test_weighted_attention_of_any_prompt(visual: int, text: int, stream: int, seed: int) -> None:
    orders = scattered(visual, text, torch.Generator().manual_seed(seed), 2)
    weights = decided(2, visual, seed) * torch.rand(2, visual, dtype=torch.float64)
    check_weighted(weighted_case(orders, (4, 2), stream, weights, seed))


def test_with_every_weight_it_is_attention_and_without_any_visual_keys_are_gone() -> None:
    orders = in_sequence(7, 9, 4)
    q, k, v, q_order, k_order, weights, scale = weighted_case(orders, (4, 2), 1, torch.ones(2, 7))
    whole = ops.attention([q], k, v, [q_order], k_order, -1, "t:vt", scale)
    torch.testing.assert_close(ops.weighted_attention(q, k, v, q_order, k_order, weights, scale), whole)
    blind = ops.attention([q], k[1:], v[1:], [q_order], k_order[1:], -1, "t:t", scale)
    torch.testing.assert_close(ops.weighted_attention(q, k, v, q_order, k_order, 0 * weights, scale), blind)


def test_a_key_without_weight_that_towers_above_the_others_leaves_finite_gradients() -> None:
    q, k, v, q_order, k_order, weights, scale = weighted_case(in_sequence(3, 4, 1), (2, 2), 1, torch.ones(2, 3))
    weights[:, 1] = 0
    k[0][:, :, 1] = 500 * q[:, :, -1]
    leaves = [x.float().requires_grad_() for x in (q, *k, *v, weights)]
    out = ops.weighted_attention(leaves[0], leaves[1:3], leaves[3:5], q_order, k_order, leaves[5], scale)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(bool(x.isfinite().all()) for x in (out, *grads))


@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention_is_its_formula(padded: bool) -> None:
    orders = scattered(6, 8, torch.Generator().manual_seed(1), 3) if padded else in_sequence(6, 8, 2)
    batch = len(orders[0])
    real = orders[1].masked_fill(orders[1] == PAD, -1)
    for until in (real.amax(1, keepdim=True), real.sort(1).values[:, -3:-2]):
        until = torch.maximum(until, orders[1].amin(1, keepdim=True))  # somebody is seen in each row
        leaves = [noise(batch, 2, n, SIZE, seed=i).requires_grad_() for i, n in enumerate((6, 8, 8))]
        out = ops.cross_attention(*leaves, until, orders[1], SCALE)
        expected = oracle.cross_attention(*leaves, until, orders[1], SCALE)
        torch.testing.assert_close(out, expected)
        slope = noise(*out.shape, seed=9)
        for a, b in zip(*(torch.autograd.grad((x * slope).sum(), leaves) for x in (out, expected)), strict=True):
            torch.testing.assert_close(a, b)
    empty = ops.cross_attention(leaves[0][:, :, :0], *leaves[1:], until, orders[1], SCALE)
    assert empty.shape == (batch, 0, 2, SIZE)


def test_decisions_are_those_of_a_hard_gumbel_softmax_and_so_are_their_gradients() -> None:
    gamma = noise(3, 50, 2).requires_grad_()
    torch.manual_seed(0)
    gumbels = -torch.empty_like(gamma).exponential_().log()
    torch.manual_seed(0)
    theirs = torch.nn.functional.gumbel_softmax(gamma, tau=1, hard=True)[..., 0]
    before = decided(3, 50, seed=4).requires_grad_()
    ours = ops.decide(gamma[..., 0] - gamma[..., 1], gumbels[..., 0] - gumbels[..., 1], before)
    assert torch.equal(ours, (theirs * before).float().round()) and set(ours.unique().tolist()) == {0.0, 1.0}
    slope = noise(3, 50, seed=8)
    pairs = [torch.autograd.grad((x * slope).sum(), (gamma, before)) for x in (ours, theirs * before)]
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    first = ops.decide(gamma[..., 0] - gamma[..., 1], gumbels[..., 0] - gumbels[..., 1])
    torch.testing.assert_close(first, theirs.float())


def test_the_mean_is_of_the_tokens_that_are_left() -> None:
    x = noise(3, 5, 4).requires_grad_()
    order = torch.tensor([[3, 4, 5, 6, 7], [1, 2, PAD, PAD, PAD], [PAD] * 5])
    weights = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 0, 0], [1] * 5]).double()
    plain, weighed = ops.mean_token(x, order), ops.mean_token(x, order, weights)
    torch.testing.assert_close(plain[:, 0], torch.stack([x[0].mean(0), x[1, :2].mean(0), 0 * x[2, 0]]))
    torch.testing.assert_close(weighed[:, 0], torch.stack([x[0, [0, 3]].mean(0), 0 * x[1, 0], 0 * x[2, 0]]))
    assert torch.autograd.gradcheck(lambda y: ops.mean_token(y, order, weights), (x,), atol=1e-4, eps=1e-4)


FLASH = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *rest, **also: 4 * math.prod(q) * k[2]
}
"""torch counts its other fused attention kernels so, and has no rule for this one."""


def test_flops_are_those_of_what_runs() -> None:
    orders = in_sequence(7, 9, 4)
    weighted = weighted_case(orders, (4, 2), 1, torch.ones(2, 7))
    q, k, v = noise(2, 2, 7, SIZE), noise(2, 2, 9, SIZE), noise(2, 2, 9, SIZE)
    cases: dict[str, tuple[Any, ...]] = {
        "weighted_attention": weighted,
        "cross_attention": (q, k, v, orders[1][:, -1:], orders[1], SCALE),
        "mean_token": (noise(2, 7, 4), orders[0]),
    }
    for name, arguments in cases.items():
        with FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
            getattr(learned, name)(*arguments)
        assert counter.get_total_flops() == counting.FLOPS[name](*arguments), name


def test_the_ops_keep_torchs_contract() -> None:
    orders = in_sequence(7, 9, 4)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    q, k, v, *rest = weighted_case(orders, (4, 2), 0, torch.ones(2, 7).requires_grad_())
    half = [x.bfloat16().requires_grad_() for x in (q, *k, *v)]
    torch.library.opcheck(ops.weighted_attention, (half[0], half[1:3], half[3:5], *rest), test_utils=checks)
    a, b = noise(2, 2, 7, SIZE).requires_grad_(), noise(2, 2, 9, SIZE)
    torch.library.opcheck(ops.cross_attention, (a, b, b, orders[1][:, -1:], orders[1], SCALE), test_utils=checks)
    scores = noise(2, 7).float().requires_grad_()
    torch.library.opcheck(ops.decide, (scores, scores.detach(), None), test_utils=checks)
    torch.library.opcheck(
        ops.mean_token, (noise(2, 7, 4).requires_grad_(), orders[0], scores.detach()), test_utils=checks
    )


def test_mixed_precision_takes_one_type() -> None:
    q, k, v, *rest = weighted_case(in_sequence(7, 9, 4), (4, 2), 0, torch.ones(2, 7))
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.weighted_attention(q.float(), [x.float() for x in k], [x.bfloat16() for x in v], *rest)
    assert out.dtype == torch.bfloat16
