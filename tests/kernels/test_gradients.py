"""Gradients of every op: those of the reference, which torch derives from plain arithmetic."""

from __future__ import annotations

import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.checkpoint import checkpoint

from foveate import ops
from foveate.kernels import attention as kernels
from foveate.kernels import reference
from foveate.kernels.neighbor import reference as neighbors
from tests.kernels.neighbor.cases import case
from tests.kernels.prompts import HEADS, LAYOUTS, SCALE, SIZE, Call, call, in_sequence, plain, real, scattered
from tests.kernels.test_tokens import ragged


def floats(arguments: Any) -> list[Tensor]:
    return [x for x in tree_leaves(arguments) if isinstance(x, Tensor) and x.is_floating_point()]


def trainable(arguments: Any, dtype: torch.dtype = torch.float64) -> Any:
    """Copies of the arguments whose floating-point tensors want gradients."""

    def copy(x: Any) -> Any:
        return x.detach().to(dtype).requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x

    return tree_map(copy, arguments)


def gradients(function: Any, arguments: Any, weight: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((function(*arguments) * weight).sum(), floats(arguments))


def check(arguments: Call) -> None:
    """Gradients of op and reference, with random weights on the real queries' results."""
    given = trainable(plain(arguments))
    expected = reference.attention(*given)
    weight = torch.randn(expected.shape, dtype=expected.dtype, generator=torch.Generator().manual_seed(7))
    weight *= real(arguments)[:, :, None, None]
    pairs = zip(gradients(ops.attention, given, weight), gradients(reference.attention, given, weight), strict=True)
    for actual, wanted in pairs:
        # Few queries take their softmax in float32.
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=2e-6)


heads = pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h[0]}on{h[1]}")


@heads
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("few", [0, 100])
def test_attention_under_a_promise(layout: str, few: int, heads: tuple[int, int]) -> None:
    with mock.patch.object(kernels, "BLOCK", 4), mock.patch.object(kernels, "FEW_QUERIES", few):
        for prefix in (0, 5):
            check(call(layout, in_sequence(6, 9, prefix), heads, prefix))


@heads
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("few", [0, 100])
def test_attention_of_padded_prompts(layout: str, few: int, heads: tuple[int, int]) -> None:
    with mock.patch.object(kernels, "BLOCK", 4), mock.patch.object(kernels, "FEW_QUERIES", few):
        check(call(layout, scattered(6, 9, torch.Generator().manual_seed(0)), heads, -1))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_attention_of_any_prompt(data: st.DataObject) -> None:
    draw = data.draw
    visual, text = draw(st.integers(0, 12), "visual"), draw(st.integers(1, 12), "text")
    layout, counts = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(HEADS))
    seed = draw(st.integers(0, 99), "seed")
    orders = scattered(visual, text, torch.Generator().manual_seed(seed), draw(st.integers(1, 3), "batch"))
    queries = draw(st.none() | st.integers(1, text), "queries") if layout[0] == "t" else None
    with mock.patch.object(kernels, "BLOCK", draw(st.sampled_from([1, 3, 256]), "block")):
        check(call(layout, orders, counts, -1, queries=queries, seed=seed))


IMAGES = {"one": [[(3, 4, 5)]], "ragged": [[(2, 3, 4), (1, 2, 2)], [(4, 5, 3)]], "no text": [[(0, 4, 4)]]}


@pytest.mark.parametrize("prompts", IMAGES.values(), ids=IMAGES)
@pytest.mark.parametrize("metric", ["chebyshev", "euclidean", "raster"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pruned", [False, True])
def test_neighbor_attention(prompts: Any, metric: str, causal: bool, pruned: bool) -> None:
    drawn = case(prompts, 1, metric, causal, heads=(4, 2))
    drawn = drawn.keeping(torch.arange(0, drawn.arguments["q"].shape[2], 2)) if pruned else drawn
    given = trainable(tuple(drawn.arguments.values()))
    weight = torch.randn(given[0].transpose(1, 2).shape, dtype=torch.float64) * drawn.real[:, :, None, None]
    actual, wanted = (gradients(f, given, weight) for f in (ops.neighbor_attention, neighbors.neighbor_attention))
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_attention_agrees_with_finite_differences() -> None:
    arguments = trainable(plain(call("vt:vt", in_sequence(3, 4, 2), (2, 1), 2)))
    q, k, v, *rest = arguments

    def function(*x: Tensor) -> Tensor:
        return ops.attention([*x[:2]], [*x[2:4]], [*x[4:]], *rest)

    with mock.patch.object(kernels, "FEW_QUERIES", 0):
        assert torch.autograd.gradcheck(function, (*q, *k, *v))


def test_no_query_at_all_gives_zero_gradients() -> None:
    arguments = call("t:t", in_sequence(2, 3, 0), (4, 2), 0)
    arguments["q"], arguments["q_order"] = [arguments["q"][0][:, :, :0]], [arguments["q_order"][0][:, :0]]
    for few in (0, 8):
        with mock.patch.object(kernels, "FEW_QUERIES", few):
            given = trainable(plain(arguments))
            found = torch.autograd.grad(ops.attention(*given).sum(), floats(given))
            assert [x.abs().sum().item() for x in found] == [0.0] * 3


@pytest.mark.parametrize("tokens", [1, 9])
def test_encoder_attention(tokens: int) -> None:
    given = trainable((*(torch.randn(2, 3, tokens, SIZE) for _ in range(3)), SCALE))
    weight = torch.randn(2, tokens, 3, SIZE, dtype=torch.float64)
    for actual, wanted in zip(
        gradients(ops.encoder_attention, given, weight),
        gradients(reference.encoder_attention, given, weight),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)
    assert torch.autograd.gradcheck(ops.encoder_attention, given)


def test_varlen_attention() -> None:
    bounds = torch.tensor([0, 4, 4, 5, 9])
    given = trainable((*(torch.randn(1, 2, 9, SIZE) for _ in range(3)), bounds, SCALE))
    weight = torch.randn(1, 9, 2, SIZE, dtype=torch.float64)
    for actual, wanted in zip(
        gradients(ops.varlen_attention, given, weight),
        gradients(reference.varlen_attention, given, weight),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)


@heads
@pytest.mark.parametrize("padded", [False, True])
def test_scores_have_gradients_too(padded: bool, heads: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    orders = scattered(6, 7, generator) if padded else in_sequence(6, 7, 3)
    a = call("t:vt", orders, heads, -1, queries=2)
    given = trainable((a["q"][0], a["k"], a["q_order"][0], a["k_order"], SCALE), torch.float32)
    weight = torch.randn(ops.attention_row(*given).shape) * real(a)[:, None, :, None]
    for actual, wanted in zip(
        gradients(ops.attention_row, given, weight), gradients(reference.attention_row, given, weight), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 7, 4), (1, 7, 4), (3, 2, 7)])
def test_gathered_tokens_hand_gradients_back_to_their_places(shape: tuple[int, ...]) -> None:
    dim = shape.index(7)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[1, 3, 3], [0, 6, 2], [5, 5, 5]])

    def function(x: Tensor) -> Tensor:
        return ops.take_tokens(x, index, dim)

    assert torch.autograd.gradcheck(function, x)


def test_choosing_tokens_is_no_differentiable_step_and_says_nothing() -> None:
    scores = torch.rand(2, 8, requires_grad=True)
    order = ragged([8, 5], torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index, kept = ops.top_tokens(scores, order, 0.5)
        x = torch.randn(2, 8, 3, requires_grad=True)
        ops.take_tokens(x, index, 1).sum().backward()
    assert not index.requires_grad and not kept.requires_grad
    assert scores.grad is None and x.grad is not None
    assert not ops.random_scores(order, 3).requires_grad


def test_only_what_wants_a_gradient_gets_one() -> None:
    q, k, v = (torch.randn(1, 2, 5, SIZE) for _ in range(3))
    ops.encoder_attention(q, k, v.requires_grad_(), SCALE).sum().backward()
    assert q.grad is None and k.grad is None and v.grad is not None
    assert not ops.encoder_attention(q, k, v.detach(), SCALE).requires_grad


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ops_keep_torchs_contract_for_gradients(layout: str) -> None:
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    arguments = trainable(plain(call(layout, in_sequence(9, 12, 4), (4, 2), 4)), torch.float32)
    torch.library.opcheck(ops.attention, arguments, test_utils=checks)
    grad = torch.randn(ops.attention(*arguments).shape)
    detached = tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, arguments)
    backward = torch.ops.foveate.attention_backward.default
    torch.library.opcheck(backward, (grad, *detached), test_utils=("test_schema", "test_faketensor"))
    q = torch.randn(2, 4, 5, SIZE, requires_grad=True)
    torch.library.opcheck(ops.encoder_attention, (q, q, q, SCALE), test_utils=checks)
    torch.library.opcheck(ops.take_tokens, (q, torch.tensor([[0, 2], [1, 4]]), 2), test_utils=checks)


def test_under_inference_mode_and_without_gradients_nothing_is_saved() -> None:
    arguments = trainable(plain(call("vt:vt", in_sequence(4, 5, 2), (2, 2), 2)), torch.float32)
    expected = ops.attention(*arguments).detach()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            found = ops.attention(*arguments)
        assert not found.requires_grad and torch.equal(found, expected)


def test_bfloat16_gradients_are_near_and_keep_their_type() -> None:
    arguments = plain(call("vt:vt", in_sequence(9, 12, 4), (4, 2), 4))
    exact, half = trainable(arguments), trainable(arguments, torch.bfloat16)
    weight = torch.randn(ops.attention(*exact).shape)
    found = gradients(ops.attention, half, weight.bfloat16())
    for actual, wanted in zip(found, gradients(reference.attention, exact, weight.double()), strict=True):
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual.double(), wanted, rtol=5e-2, atol=5e-2)


def test_activation_checkpointing_changes_nothing() -> None:
    arguments = trainable(plain(call("vt:vt", in_sequence(9, 12, 4), (4, 2), 4)))
    wanted = torch.autograd.grad(ops.attention(*arguments).sin().sum(), floats(arguments))
    for reentrant in (True, False):
        again = trainable(arguments)

        def run(*values: Tensor, again: Any = again) -> Tensor:
            return ops.attention([*values[:2]], [*values[2:4]], [*values[4:]], *again[3:]).sin()

        checkpoint(run, *floats(again), use_reentrant=reentrant).sum().backward()
        assert all(torch.equal(x.grad, y) for x, y in zip(floats(again), wanted, strict=True))


def test_autocast_gives_attention_one_type() -> None:
    arguments = trainable(plain(call("vt:vt", in_sequence(9, 12, 4), (4, 2), 4)), torch.float32)
    mixed = [arguments[0], arguments[1], [x.detach().bfloat16().requires_grad_() for x in arguments[2]], *arguments[3:]]
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.attention(*mixed)
        row = ops.attention_row(mixed[0][1], mixed[1], mixed[3][1], mixed[4], SCALE)
    assert (out.dtype, row.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out.float(), ops.attention(*arguments), rtol=2e-2, atol=2e-2)
    out.float().sum().backward()
    assert mixed[0][0].grad.dtype == torch.float32 and mixed[2][0].grad.dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_function_has_the_same_gradients(backend: str) -> None:
    def function(q: list[Tensor], k: list[Tensor], v: list[Tensor], *rest: Any) -> Tensor:
        out = ops.attention([x * 1.5 for x in q], k, v, *rest)
        index = rest[0][0][:, :2] * 0 + 1
        return (ops.take_tokens(out, index, 1) + out[:, :2]).sin()

    compiled = torch.compile(function, backend=backend, dynamic=True, fullgraph=True)
    for visual, text in ((9, 12), (5, 20)):
        arguments = trainable(plain(call("vt:vt", in_sequence(visual, text, 4), (4, 2), 4)), torch.float32)
        wanted = torch.autograd.grad(function(*arguments).sum(), floats(arguments))
        found = torch.autograd.grad(compiled(*arguments).sum(), floats(arguments))
        for actual, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
