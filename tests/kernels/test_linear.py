"""Linears by oneDNN: the same values as torch's, wherever they are taken, and torch's wherever they are not."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate import ops
from foveate.backends import eager, inductor
from foveate.kernels import linear as module
from foveate.kernels.linear import linear
from foveate.models.random import random_inputs
from tests.ir.programs import llava

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Take oneDNN whatever processor this is and however small the weight; the sizes of weights that it was given."""
    monkeypatch.setattr(module, "pays", lambda: True)
    monkeypatch.setattr(module, "LARGE", 1)
    calls: list[tuple[int, ...]] = []
    real = module._onednn

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None, ordered: bool) -> Tensor:
        calls.append(tuple(weight.shape))
        return real(x, weight, bias, ordered)

    monkeypatch.setattr(module, "_onednn", noted)
    return calls


PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "whole": lambda w: w,
    "first rows": lambda w: w[:20],
    "last rows": lambda w: w[20:],
    "first columns": lambda w: w[:, :24],
    "last columns": lambda w: w[:, 24:],
    "transposed": lambda w: w.t(),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(40,), (2, 33), (1, 4, 9), (1, 1)])
@pytest.mark.parametrize("part", PARTS)
def test_a_linear_is_torchs(part: str, lead: tuple[int, ...], bias: bool, taken: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    weight = PARTS[part](torch.randn(48, 56))
    rows, columns = weight.shape
    b = torch.randn(rows) if bias else None
    wide = torch.randn(*lead, columns + 8)
    for x in (wide[..., :columns], wide[..., :columns].contiguous()):
        torch.testing.assert_close(linear(x, weight, b), functional.linear(x, weight, b), atol=1e-5, rtol=1e-5)
    few = x.numel() // columns < module.MANY and not weight.is_contiguous()
    assert taken == ([] if few else [(rows, columns)] * 2)


@pytest.mark.parametrize("lead", [(1, 3), (1, 4), (2, 5), (64,), (4, 16), (65,)])
def test_few_tokens_change_places_with_the_weight(lead: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    factors: list[tuple[int, ...]] = []
    real = module._product
    monkeypatch.setattr(module, "_product", lambda x, w, b: factors.append(tuple(w.shape)) or real(x, w, b))  # type: ignore[func-returns-value]  # add in passing
    weight, low = torch.randn(80, 16), torch.randn(64, 16)
    tokens = math.prod(lead)
    for x in (torch.randn(*lead, 16), torch.randn(*lead, 24)[..., :16]):
        found = linear(x, weight)
        torch.testing.assert_close(found, functional.linear(x, weight), atol=1e-5, rtol=1e-5)
        assert found.is_contiguous()
        weight.add_(1)
        torch.testing.assert_close(linear(x, weight), functional.linear(x, weight), atol=1e-5, rtol=1e-5)
        linear(x, low)
        linear(x, weight, torch.randn(80))
    swapped = (tokens, 16) if tokens in module.FEW else (80, 16)
    assert factors == [swapped, swapped, (64, 16), (80, 16)] * 2


@pytest.mark.parametrize("lead", [(1, 3), (64,), (4, 16), (1, 65)])
def test_an_ffn_keeps_few_tokens_column_by_column(lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, gate, up, down = torch.randn(*lead, 72), torch.randn(96, 72), torch.randn(96, 72), torch.randn(80, 96)
    middle = functional.silu(linear(x, gate, ordered=False)) * linear(x, up, ordered=False)
    expected = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
    torch.testing.assert_close(middle, expected, atol=1e-4, rtol=1e-5)
    assert middle.is_contiguous() != (math.prod(lead) in module.FEW)
    found = linear(middle, down)
    torch.testing.assert_close(found, functional.linear(expected, down), atol=1e-3, rtol=1e-5)
    assert found.is_contiguous()
    # A part of such columns has strides that oneDNN does not know as either order.
    part, some = middle[..., 8:72], down[:, :64].contiguous()
    torch.testing.assert_close(linear(part, some), functional.linear(part, some), atol=1e-3, rtol=1e-5)


def test_only_what_linears_alone_use_is_left_column_by_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "pays", lambda: True)
    program = foveate.optimize(llava(), passes=[]).program
    module = eager.graph_module(program, program.graphs["decode"], "decode")
    linears = [n for n in module.graph.nodes if n.target == linear]
    left = {str(n.args[1]).split("_")[-3] for n in linears if not n.kwargs["ordered"]}
    assert left == {"gate", "up"}
    assert sum(not n.kwargs["ordered"] for n in linears) == 2 * program.info.layers < len(linears)


def test_no_tokens_and_one_row(taken: list[tuple[int, ...]]) -> None:
    weight = torch.randn(5, 3)
    assert linear(torch.zeros(1, 0, 3), weight).shape == (1, 0, 5)
    assert linear(torch.zeros(2, 3), torch.zeros(0, 3)).shape == (2, 0)
    assert not taken
    x = torch.randn(3)
    torch.testing.assert_close(linear(x, weight), functional.linear(x, weight))


def test_what_is_differentiated_cast_or_narrow_is_left_to_torch(taken: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(40, 8), torch.randn(6, 8)
    for leaf in (x, weight):
        leaf.requires_grad_()
        linear(x, weight).sum().backward()
        assert leaf.grad is not None and not taken
        leaf.requires_grad_(False)
    bias = torch.randn(6, requires_grad=True)
    linear(x, weight, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((6,), 40.0)) and not taken  # type: ignore[arg-type]  it has one
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    assert linear(x.to("meta"), weight.to("meta")).is_meta
    assert not taken
    weight.requires_grad_()
    with torch.inference_mode():
        linear(x, weight)
    assert taken


def test_a_weight_that_has_changed_is_read_again() -> None:
    x, weight = torch.randn(40, 4), torch.randn(6, 8)
    linear(x, weight[:, :4])
    weight.data.add_(1)
    torch.testing.assert_close(linear(x, weight[:, :4]), functional.linear(x, weight[:, :4]))


@pytest.mark.parametrize("call", [linear, ops.linear])
def test_its_flops_are_counted(call: Callable[..., Tensor], taken: list[tuple[int, ...]]) -> None:
    x, weight = torch.randn(2, 20, 8), torch.randn(6, 8)
    with FlopCounterMode(display=False) as counter:
        call(x, weight)
    assert taken and counter.get_total_flops() == 2 * 40 * 8 * 6


@pytest.mark.parametrize("bias", [False, True])
def test_the_op_for_compilers_is_torchs_with_gradients(bias: bool) -> None:
    values = [torch.randn(2, 20, 8), torch.randn(6, 8), *([torch.randn(6)] if bias else [])]
    found = []
    for call in (functional.linear, ops.linear, torch.compile(ops.linear, fullgraph=True)):
        inputs = [value.clone().requires_grad_() for value in values]
        out = call(*inputs)
        out.square().sum().backward()
        found.append([out, *(x.grad for x in inputs)])
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(*values).dtype == torch.bfloat16


@pytest.mark.slow
def test_a_compiled_program_runs_with_it(taken: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    source = llava()
    inputs = random_inputs(source, text_tokens=40)
    expected = source(**inputs).logits[:, -1]
    monkeypatch.setattr(inductor, "pays", lambda: True)
    optimized = foveate.optimize(source, passes=[], backend="inductor")
    with torch.inference_mode():
        logits = optimized(**inputs).logits
    torch.testing.assert_close(logits.flatten(), expected.flatten(), atol=1e-5, rtol=1e-5)
    assert taken
    torch.testing.assert_close(optimized(**inputs).logits, logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("passes", ["", "drop-visual-heads{keep=2}, drop-visual-neurons{keep=0.5}"])
def test_a_program_runs_with_it(passes: str, taken: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    source = llava(visual_tokens=64)
    inputs = random_inputs(source, text_tokens=40)
    logits = []
    for taken_there in (False, True):
        monkeypatch.setattr(eager, "pays", lambda answer=taken_there: answer)
        optimized = foveate.optimize(source, passes=passes)
        with torch.inference_mode():
            logits.append(optimized(**inputs).logits)
        assert bool(taken) == taken_there
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    ffn = optimized.program.info.intermediate_size
    parts = [columns for _, columns in taken if columns == ffn // 2]
    assert bool(parts) == bool(passes)


def test_other_processors_keep_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(module, "cpu_name", lambda: "Some(R) Other CPU")
    module.pays.cache_clear()
    assert not module.pays()
    module.pays.cache_clear()
