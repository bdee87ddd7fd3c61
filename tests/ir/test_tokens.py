"""Token-axis analysis on graphs made by hand: what mixes tokens is an error that names its place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from foveate import ops
from foveate.errors import TraceError
from foveate.ir.program import NodeInfo, Program, Symbols, Weights
from foveate.ir.rewriter import Rewriter
from foveate.ir.tokens import token_axes
from tests.ir.programs import traced

aten = torch.ops.aten
HERE = NodeInfo(3, "mlp.strange_proj", "text")
END = 2**63 - 1

INPUTS: dict[str, tuple[Any, ...]] = {
    "x": ("batch", "sequence", 8),
    "y": ("batch", "sequence", 8),
    "heads": ("batch", 2, "sequence", 4),
    "turned": ("batch", 8, "sequence"),
    "rows": ("sequence", 8),
    "flat": ("sequence",),
    "other": ("batch", 6, 8),
    "whole": ("batch", "sequence"),
}
AXES = {"x": 1, "y": 1, "heads": 2, "turned": 2, "rows": 0, "flat": 0, "whole": 1}
"""`other` has no tokens."""

Make = Callable[[Rewriter, dict[str, fx.Node]], fx.Node]


def op(target: Any, *args: Any, **kwargs: Any) -> Make:
    """A call whose string arguments are inputs or weights."""

    def make(edit: Rewriter, values: dict[str, fx.Node]) -> fx.Node:
        def value(arg: Any) -> Any:
            if isinstance(arg, list):
                return [value(a) for a in arg]
            if isinstance(arg, str):
                return values[arg] if arg in values else edit.weight(arg)
            return arg

        return edit.call(target, *map(value, args), about=HERE, name="it", **kwargs)

    return make


def axis_of(make: Make) -> int | None:
    weights = Weights()
    for name, size in (("w", (8, 8)), ("b", (8,)), ("places", (6, 8)), ("single", (1, 1, 8)), ("w4", (4, 4))):
        weights.put(name, torch.zeros(size))
    program = Program(traced(layers=2)[1].info, weights, Symbols())
    edit = Rewriter(program, fx.Graph(), by="test")
    values = {
        name: edit.placeholder(
            name,
            program.symbols.tensor(*size, dtype=torch.float32, device=torch.device("cpu")),
            NodeInfo(-1, name, "text"),
        )
        for name, size in INPUTS.items()
    }
    return token_axes(edit.graph, AXES)[node] if (node := make(edit, values)) else None


@pytest.mark.parametrize(
    ("make", "axis"),
    [
        (op(aten.linear.default, "x", "w", "b"), 1),
        (op(aten.linear.default, "heads", "w4"), 2),
        (op(aten.add.Tensor, "x", "y"), 1),
        (op(aten.mul.Tensor, "x", "b"), 1),
        (op(aten.mul.Tensor, "b", "x"), 1),
        (op(aten.mul.Tensor, "x", "single"), 1),
        (op(aten.add.Tensor, "x", "rows"), 1),
        (op(aten.mul.Tensor, "turned", "flat"), 2),
        (op(aten.mul.Tensor, "x", 2.0), 1),
        (op(aten.pow.Tensor_Scalar, "x", 2), 1),
        (op(aten.unflatten.int, "x", 2, [2, 4]), 1),
        (op(aten.unflatten.int, "turned", 1, [2, 4]), 3),
        (op(aten.unflatten.int, "turned", -2, [2, 4]), 3),
        (op(aten.flatten.using_ints, "heads", 0, 1), 1),
        (op(aten.transpose.int, "x", 1, 2), 2),
        (op(aten.transpose.int, "x", -1, -2), 2),
        (op(aten.transpose.int, "heads", 0, 1), 2),
        (op(aten.unsqueeze.default, "x", 1), 2),
        (op(aten.unsqueeze.default, "x", 2), 1),
        (op(aten.unsqueeze.default, "x", -1), 1),
        (op(aten.unsqueeze.default, "x", -3), 2),
        (op(aten.slice.Tensor, "x", 2, 0, 4), 1),
        (op(aten.slice.Tensor, "x", 1, -1, END), None),
        (op(aten.select.int, "heads", 0, 0), 1),
        (op(aten.select.int, "x", -1, 3), 1),
        (op(aten.mean.dim, "x", [-1], True), 1),
        (op(aten.mean.dim, "x", [-1]), 1),
        (op(aten.sum.dim_IntList, "heads", [1, 3]), 1),
        (op(aten.sum.dim_IntList, "heads", [1, 3], True), 2),
        (op(aten.sum.dim_IntList, "x", [0]), 0),
        (op(aten.softmax.int, "x", -1), 1),
        (op(aten.rms_norm.default, "x", [8], "b"), 1),
        (op(aten.layer_norm.default, "x", [8], "b", "b"), 1),
        (op(aten.cat.default, ["x", "y"], -1), 1),
        (op(aten.cat.default, ["x", "y"], 0), 1),
        (op(aten.matmul.default, "x", "w"), 1),
        (op(aten.matmul.default, "w", "turned"), 2),
        (op(aten.linear.default, "other", "w"), None),
        (op(aten.cumsum.default, "other", 1), None),
        (op(ops.random_scores, "whole", 3), 1),
    ],
)
def test_ops_that_keep_tokens_apart_say_where_the_tokens_are(make: Make, axis: int | None) -> None:
    assert axis_of(make) == axis


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (op(aten.softmax.int, "x", 1), "aten.softmax.int"),
        (op(aten.softmax.int, "heads", -2), "aten.softmax.int"),
        (op(aten.mean.dim, "x", [1]), "aten.mean.dim"),
        (op(aten.mean.dim, "x", [-2, -1], True), "aten.mean.dim"),
        (op(aten.mean.dim, "x", None), "aten.mean.dim"),
        (op(aten.sum.dim_IntList, "x", []), "aten.sum.dim_IntList"),
        (op(aten.sum.dim_IntList, "heads", [0, 1, 2, 3]), "aten.sum.dim_IntList"),
        (op(aten.matmul.default, "x", "turned"), "aten.matmul.default"),
        (op(aten.matmul.default, "turned", "x"), "aten.matmul.default"),
        (op(aten.matmul.default, "whole", "x"), "aten.matmul.default"),
        (op(aten.linear.default, "x", "rows"), "aten.linear.default"),
        (op(aten.linear.default, "other", "rows"), "aten.linear.default"),
        (op(aten.flatten.using_ints, "x", 1, 2), "aten.flatten.using_ints"),
        (op(aten.flatten.using_ints, "x", 0, 1), "aten.flatten.using_ints"),
        (op(aten.flatten.using_ints, "heads", 1, -1), "aten.flatten.using_ints"),
        (op(aten.flatten.using_ints, "x"), "aten.flatten.using_ints"),
        (op(aten.unflatten.int, "x", 1, [-1, 1]), "aten.unflatten.int"),
        (op(aten.slice.Tensor, "x", 1, 0, 4), "aten.slice.Tensor"),
        (op(aten.select.int, "x", 1, 0), "aten.select.int"),
        (op(aten.select.int, "heads", -2, 3), "aten.select.int"),
        (op(aten.slice.Tensor, "x", 1, -2, END), "aten.slice.Tensor"),
        (op(aten.slice.Tensor, "x", 1, 1, END), "aten.slice.Tensor"),
        (op(aten.slice.Tensor, "x", -2, 0, 3), "aten.slice.Tensor"),
        (op(aten.cat.default, ["x", "y"], 1), "aten.cat.default"),
        (op(aten.cat.default, ["x", "y"], -2), "aten.cat.default"),
        (op(aten.cat.default, ["flat", "flat"]), "aten.cat.default"),
        (op(aten.cumsum.default, "x", 1), "aten.cumsum.default"),
        (op(aten.cumsum.default, "x", 2), "aten.cumsum.default"),
        (op(aten.flip.default, "x", [1]), "aten.flip.default"),
        (op(aten.roll.default, "x", [1], [1]), "aten.roll.default"),
    ],
)
def test_ops_that_mix_tokens_are_named_with_node_layer_and_role(make: Make, name: str) -> None:
    with pytest.raises(TraceError) as caught:
        axis_of(make)
    message = str(caught.value)
    for part in ("layer 3", "mlp.strange_proj", "node it", name):
        assert part in message


def test_tokens_against_tokens_in_one_elementwise_op_are_mixed() -> None:
    def make(edit: Rewriter, values: dict[str, fx.Node]) -> fx.Node:
        column = edit.call(aten.unsqueeze.default, values["whole"], 2, about=HERE)
        row = edit.call(aten.unsqueeze.default, values["whole"], 1, about=HERE)
        return edit.call(aten.sub.Tensor, column, row, about=HERE, name="it")

    with pytest.raises(TraceError, match=r"node it: aten.sub.Tensor mixes tokens: .* different axes"):
        axis_of(make)


def test_counting_tokens_is_refused_where_the_count_is_used() -> None:
    def counted(dim: int) -> Make:
        def make(edit: Rewriter, values: dict[str, fx.Node]) -> fx.Node:
            count = edit.call(aten.sym_size.int, values["x"], dim, about=NodeInfo(-1, "model", "text"))
            return edit.call(aten.slice.Tensor, values["y"], 2, 0, count, about=HERE, name="it")

        return make

    assert axis_of(counted(0)) == 1
    with pytest.raises(
        TraceError, match=r"^layer 3, mlp.strange_proj, node it: aten.slice.Tensor mixes tokens: it dep"
    ):
        axis_of(counted(1))


def test_a_constant_for_each_place_is_mixed_in_only_where_it_is_seen() -> None:
    def make(edit: Rewriter, values: dict[str, fx.Node]) -> fx.Node:
        short = edit.call(aten.sum.dim_IntList, values["other"], [0], about=HERE)  # [6, 8], no tokens
        return edit.call(aten.add.Tensor, values["turned"], short, about=HERE, name="it")

    with pytest.raises(TraceError):
        axis_of(make)


def test_take_tokens_along_another_axis_is_mixed() -> None:
    def make(edit: Rewriter, values: dict[str, fx.Node]) -> fx.Node:
        scores = edit.call(ops.random_scores, values["whole"], 3, about=HERE)
        chosen = edit.call(ops.top_tokens, scores, values["whole"], 0.5, about=HERE)
        index = edit.item(chosen, 0, HERE)
        return edit.call(ops.take_tokens, values["turned"], index, 1, about=HERE, name="it")

    with pytest.raises(TraceError, match="another axis"):
        axis_of(make)
