"""Recorded ops in canonical form: the same function, in few and known ops, or an error that names the node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from foveate.errors import TraceError
from foveate.ir.program import Program, Symbols, Weights, info, outputs
from foveate.ir.rewriter import nodes_of
from foveate.ir.trace import import_graph, record
from tests.ir.programs import traced

aten = torch.ops.aten


class Calls(nn.Module):
    """A module that calls a function of its input and its weights."""

    def __init__(self, function: Callable[..., Tensor], **weights: Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in weights.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parameters())


def imported(function: Callable[..., Tensor], shape: tuple[int, ...], **weights: Tensor) -> tuple[Program, fx.Graph]:
    """The graph of a function of x [patches, *shape] and the weights; it must give what the function gives."""
    module = Calls(function, **weights)
    program = Program(traced()[1].info, Weights(), Symbols())
    for name, value in module.named_parameters():
        program.weights.put(name, value)
    recorded = record(module, (torch.randn(12, *shape),), ({0: torch.export.Dim.DYNAMIC},))
    fake = program.symbols.tensor("patches", *shape, dtype=torch.float32, device=torch.device("cpu"))
    graph = import_graph(program, recorded, {"pixel_values": fake}, 0, lambda name: name, causal=False)
    for count in (4, 20):
        x = torch.randn(count, *shape)
        with torch.no_grad():
            actual = fx.GraphModule(program.weights, graph)(x)["out"]
            torch.testing.assert_close(actual, function(x, *module.parameters()), rtol=1e-5, atol=1e-5)
    return program, graph


def ops(graph: fx.Graph) -> list[str]:
    return [str(n.target).removeprefix("aten.").split(".")[0] for n in graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(
    ("function", "shape", "expected"),
    [
        (lambda x: x.view(-1, 3, 4) * 1.5, (12,), ["unflatten", "mul"]),
        (lambda x: x.reshape(x.shape[0], -1) * 1.5, (3, 4), ["flatten", "mul"]),
        (lambda x: x.view(-1, 3, 2, 4) * 1.5, (6, 4), ["unflatten", "mul"]),
        (lambda x: x.reshape(x.shape[0], 6, 4) * 1.5, (3, 2, 4), ["flatten", "mul"]),
        (lambda x: x.view(x.shape[0], 3, 4) * 1.5, (6, 2), ["unflatten", "flatten", "mul"]),
        (lambda x: x.view(-1, 20) * 1.5, (5,), ["unflatten", "flatten", "mul"]),
        (lambda x: x[None].reshape(x.shape[0], 10) * 1.5, (2, 5), ["unsqueeze", "select", "flatten", "mul"]),
        (lambda x: (x.view(-1, 2, 3) * 1.5).view(x.shape[0], 6), (6,), ["unflatten", "mul", "flatten"]),
        (lambda x: x.view(-1, 2, 3).view(-1, 6) * 1.5, (6,), ["mul"]),
        (lambda x: x.permute(0, 2, 1) * 1.5, (2, 3), ["transpose", "mul"]),
        (lambda x: x.permute(1, 2, 0) * 1.5, (2, 3), ["permute", "mul"]),
        (lambda x: torch.add(*x.chunk(2, -1)), (6,), ["slice", "slice", "add"]),
        (lambda x: torch.add(*x.split(3, 1)), (6, 2), ["slice", "slice", "add"]),
        (lambda x: x.split([1, 2, 3], dim=1)[1] * 1.5, (6,), ["slice", "mul"]),
        (lambda x: torch.sub(*x.unbind(1)), (2, 3), ["select", "select", "sub"]),
    ],
)
def test_an_op_becomes_these_ops_and_the_same_function(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...], expected: list[str]
) -> None:
    assert ops(imported(function, shape)[1]) == expected


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: x.reshape(-1) * 1.5, (3,)),
        (lambda x: x.view(-1, 9) * 1.5, (4, 6)),
        (lambda x: x.view(x.shape[0], 4, 3) * 1.5, (6, 2)),
    ],
)
def test_a_reshape_that_cannot_be_read_is_an_error_that_names_it(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    with pytest.raises(TraceError, match=r"layer -1, model, node \w+: cannot read the reshape \(.*\) -> \(.*\)"):
        imported(function, shape)


def test_cutting_the_tokens_themselves_is_refused() -> None:
    with pytest.raises(TraceError, match=r"could not be traced|cuts an axis of unknown size"):
        imported(lambda x: x.chunk(2, 0)[0] * 1.5, (6,))


# --- convolutions -----------------------------------------------------------------------------------------


def convolve(x: Tensor, w: Tensor, *b: Tensor, **options: Any) -> Tensor:
    call = nn.functional.conv3d if w.dim() == 5 else nn.functional.conv2d
    return call(x, w, *b, **options).flatten(1)


@pytest.mark.parametrize("kernel", [(3, 2, 4, 4), (3, 4, 4)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_convolution_over_its_whole_input_is_a_linear(kernel: tuple[int, ...], biased: bool) -> None:
    weights = {"w": torch.randn(5, *kernel), **({"b": torch.randn(5)} if biased else {})}
    _, graph = imported(lambda x, *w: convolve(x, *w, stride=kernel[1:]), kernel, **weights)
    assert "linear" in ops(graph)
    assert not {"conv2d", "conv3d"} & set(ops(graph))


def test_packed_patches_are_not_reshaped_at_all() -> None:
    _, graph = imported(
        lambda x, w: nn.functional.conv3d(x.view(-1, 3, 2, 4, 4), w, stride=(2, 4, 4)).view(-1, 5),
        (96,),
        w=torch.randn(5, 3, 2, 4, 4),
    )
    assert [(n.target, n.args[0].op) for n in graph.nodes if n.op == "call_function"] == [
        (aten.flatten.using_ints, "get_attr"),
        (aten.linear.default, "placeholder"),
    ]


@pytest.mark.parametrize(
    ("size", "options"), [((3, 8, 8), {"stride": 4}), ((3, 4, 4), {"padding": 1}), ((6, 4, 4), {"groups": 2})]
)
def test_any_other_convolution_stays_one(size: tuple[int, ...], options: dict[str, Any]) -> None:
    _, graph = imported(lambda x, w: convolve(x, w, **options), size, w=torch.randn(6, 3, 4, 4))
    assert "conv2d" in ops(graph)


# --- fused linears ----------------------------------------------------------------------------------------


def fused(x: Tensor, w: Tensor, *b: Tensor) -> Tensor:
    y = nn.functional.linear(x, w, *b)
    return y[..., :3] * y[..., 3:6] + y[:, 6:]


@pytest.mark.parametrize("biased", [True, False])
def test_a_fused_linear_becomes_one_linear_for_each_part(biased: bool) -> None:
    weights = {"w": torch.randn(9, 4), **({"b": torch.randn(9)} if biased else {})}
    _, graph = imported(fused, (4,), **weights)
    linears = nodes_of(graph, op=aten.linear.default)
    assert [info(n).role for n in linears] == ["model[0]", "model[1]", "model[2]"]
    assert [n.meta["val"].shape[-1] for n in linears] == [3, 3, 3]
    for place, node in enumerate(linears):
        cuts = [a.args[1:] for a in node.args[1:] if a is not None]
        assert cuts == [(0, 3 * place, 3 * place + 3)] * (1 + biased)
        assert all(a.args[0].op == "get_attr" for a in node.args[1:] if a is not None)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: (y := nn.functional.linear(x, w))[:, :5] + y[:, 4:],
        lambda x, w: (y := nn.functional.linear(x, w))[:, :4] + y[:, 5:],
        lambda x, w: (y := nn.functional.linear(x, w))[:, :4].sum(1) + y[:, 4:].sum(1) + y.sum(1),
        lambda x, w: nn.functional.linear(x, w)[:, :4] * 1.5,
        lambda x, w: (y := nn.functional.linear(x, w))[:, ::2].sum(1) + y[:, 1::2].sum(1),
    ],
    ids=["overlap", "gap", "used whole", "one part", "steps"],
)
def test_a_linear_that_is_not_cut_into_parts_stays_whole(function: Callable[..., Tensor]) -> None:
    _, graph = imported(function, (4,), w=torch.randn(9, 4))
    (linear,) = nodes_of(graph, op=aten.linear.default)
    assert linear.args[1].op == "get_attr"
    assert info(linear).role == "model"


def test_an_op_that_is_not_known_is_refused_by_name() -> None:
    def odd(x: Tensor) -> Tensor:
        return x[: x.shape[0] // 2] * 1.5

    with pytest.raises(TraceError, match=r"node floordiv: <built-in function floordiv> is not an op that can be"):
        imported(odd, (6,))


def test_the_output_is_kept() -> None:
    assert set(outputs(imported(lambda x: x * 2, (3,))[1])) == {"out"}
