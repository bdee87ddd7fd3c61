"""Rotary embeddings, RMS norms and sums as one call: what is replaced, what is not, and that it is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

import foveate
from foveate.backends.eager import graph_module
from foveate.backends.fused import fuse, normed, rotated, summed
from foveate.ir.join import join
from tests.models import tiny


def rotation(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def norm_of_gemma(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + weight)


def turned_the_other_way(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., :half], x[..., half:]], -1) * sin


def of_thirds(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    third = x.shape[-1] // 3
    return x * cos + torch.cat([-x[..., third:], x[..., :third]], -1) * sin


def one_value_for_all(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rotation(x, cos[..., :1], sin)


def of_something_else(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(weight.pow(2).mean(-1, keepdim=True) + 1e-6))


def by_the_sum(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6))


def cubed(x: Tensor, weight: Tensor) -> Tensor:
    return weight * (x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1e-6))


def residual(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x + torch.cat([a, b], 1)


def residual_of_all_rows(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return x[:, :1] + torch.cat([a, b], 1)


def residual_and_its_parts(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    both = torch.cat([a, b], 1)
    return (x + both) * both


def fused(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    made: fx.GraphModule = make_fx(function, tracing_mode="fake")(*inputs)
    fuse(made.graph)
    made.recompile()
    return made


def calls(module: fx.GraphModule) -> list[Any]:
    return [node.target for node in module.graph.nodes if node.op == "call_function"]


def tensors(count: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(0, 9), st.integers(1, 9), st.booleans())
def test_a_rotation_is_one_call_and_the_same(batch: int, heads: int, tokens: int, half: int, lies_across: bool) -> None:
    x, cos, sin = tensors(tokens, (batch, heads, tokens, 2 * half), *[(batch, 1, tokens, 2 * half)] * 2)
    if lies_across:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    before = x.clone()
    module = fused(rotation, x, cos, sin)
    assert calls(module) == [rotated]
    torch.testing.assert_close(module(x, cos, sin), rotation(x, cos, sin), rtol=0, atol=1e-6)
    assert torch.equal(x, before)


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(1, 40), st.sampled_from([norm, norm_of_gemma]))
def test_a_norm_is_one_call_and_the_same(tokens: int, size: int, function: Callable[..., Tensor]) -> None:
    x, weight = tensors(tokens, (2, tokens, size), (size,))
    before = x.clone()
    module = fused(function, x, weight)
    assert normed in calls(module)
    assert torch.ops.aten.rsqrt.default not in calls(module)
    torch.testing.assert_close(module(x, weight), function(x, weight), rtol=1e-6, atol=1e-6)
    assert torch.equal(x, before)


@settings(deadline=None)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 5))
def test_a_sum_with_a_concatenation_is_one_call_and_the_same(first: int, second: int, size: int) -> None:
    # Sizes of 0 and 1 are special to the tracer, so what it makes of others is run with these.
    module = fused(residual, *tensors(0, (2, 7, size), (2, 4, size), (2, 3, size)))
    assert calls(module) == [summed]
    inputs = tensors(first, (2, first + second, size), (2, first, size), (2, second, size))
    before = [x.clone() for x in inputs]
    assert torch.equal(module(*inputs), residual(*inputs))
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("function", [residual_of_all_rows, residual_and_its_parts])
def test_what_is_no_such_sum_stays(function: Callable[..., Tensor]) -> None:
    inputs = tensors(0, (1, 7, 4), (1, 5, 4), (1, 2, 4))
    module = fused(function, *inputs)
    assert summed not in calls(module)
    assert torch.equal(module(*inputs), function(*inputs))


@pytest.mark.parametrize("function", [turned_the_other_way, of_thirds, one_value_for_all])
def test_what_is_no_rotation_stays(function: Callable[..., Tensor]) -> None:
    inputs = tensors(0, *[(1, 2, 5, 12)] * 3)
    module = fused(function, *inputs)
    assert rotated not in calls(module)
    assert torch.equal(module(*inputs), function(*inputs))


@pytest.mark.parametrize("function", [of_something_else, by_the_sum, cubed])
def test_what_is_no_norm_stays(function: Callable[..., Tensor]) -> None:
    inputs = tensors(0, (1, 5, 12), (12,))
    module = fused(function, *inputs)
    assert normed not in calls(module)
    assert torch.equal(module(*inputs), function(*inputs))


def test_half_precision_stays_as_it_rounds() -> None:
    inputs = tensors(0, *[(1, 2, 5, 12)] * 3, dtype=torch.bfloat16)
    assert rotated not in calls(fused(rotation, *inputs))
    assert normed not in calls(fused(norm, *tensors(0, (1, 5, 12), (12,), dtype=torch.bfloat16)))


def test_a_value_that_something_else_reads_is_still_there() -> None:
    def both(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        squares = x.pow(2)
        return weight * (x * torch.rsqrt(squares.mean(-1, keepdim=True) + 1e-6)), squares

    x, weight = tensors(0, (1, 5, 12), (12,))
    module = fused(both, x, weight)
    assert normed in calls(module)
    for found, expected in zip(module(x, weight), both(x, weight), strict=True):
        torch.testing.assert_close(found, expected)


def test_gradients_are_the_same() -> None:
    x, cos, sin = tensors(0, *[(1, 2, 5, 12)] * 3)
    y, weight = tensors(1, (1, 5, 12), (12,))
    z, a, b = tensors(2, (1, 7, 4), (1, 5, 4), (1, 2, 4))
    for one, other, inputs in (
        (residual, lambda z, a, b: summed(z, [a, b], 1), (z, a, b)),
        (lambda b: residual(z, a, b), lambda b: summed(z, [a, b], 1), (b,)),
        (rotation, rotated, (x, cos, sin)),
        (norm, lambda y, weight: normed(y, weight, 1e-6), (y, weight)),
        # Only the weight learns.
        (lambda weight: norm(y, weight), lambda weight: normed(y, weight, 1e-6), (weight,)),
    ):
        found = []
        for function in (one, other):
            leaves = [value.clone().requires_grad_() for value in inputs]
            found.append(torch.autograd.grad(function(*leaves).square().sum(), leaves))
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl", "gemma3"])
def test_every_rotation_and_norm_of_a_decoder_is_replaced(name: str) -> None:
    program = foveate.trace(getattr(tiny, name)())
    graph = graph_module(program, program.graphs["decode"], "decode").graph
    targets = [node.target for node in graph.nodes]
    assert targets.count(rotated) == 2 * program.info.layers
    assert targets.count(normed) > 2 * program.info.layers
    assert not {torch.ops.aten.rsqrt.default, torch.ops.aten.neg.default} & set(targets)


def test_no_residual_of_both_streams_is_put_together_first() -> None:
    program = foveate.optimize(tiny.llava(), "drop-visual-neurons{keep=0.5}").program
    graph = join(program, program.graphs["prefill"], share=False)
    targets = [node.target for node in graph_module(program, graph, "prefill").graph.nodes]
    assert targets.count(summed) == program.info.layers - 1  # the last layer does nothing for visual tokens


def test_weights_that_could_learn_are_not_written_to() -> None:
    x, weight = tensors(1, (1, 5, 12), (12,))
    learns = weight.clone().requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(normed(x, learns, 1e-6), norm(x, weight), rtol=1e-6, atol=1e-6)
    assert torch.equal(learns, weight)
    # With gradients there are no writes at all, which autograd would refuse.
    normed(x.requires_grad_(), learns, 1e-6).sum().backward()
    assert learns.grad is not None


def test_under_autocast_dtypes_and_values_are_those_of_the_ops() -> None:
    x, cos, sin = tensors(0, *[(1, 2, 5, 12)] * 3)
    y, weight = tensors(1, (1, 5, 12), (12,))
    z, a, b = tensors(2, (1, 7, 4), (1, 5, 4), (1, 2, 4))
    x, y, a = x.bfloat16(), y.bfloat16(), a.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for found, expected in (
            (rotated(x, cos, sin), rotation(x, cos, sin)),
            (normed(y, weight, 1e-6), norm(y, weight)),
            (summed(z, [a, b], 1), residual(z, a, b)),
            (summed(z, [a, b.bfloat16()], 1), residual(z, a, b.bfloat16())),
            (summed(z.bfloat16(), [a, b], 1), residual(z.bfloat16(), a, b)),
        ):
            assert found.dtype == expected.dtype == torch.float32
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
