"""Reading, cutting and reordering weights, whole ones and parts of fused ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from foveate.errors import PassError
from foveate.ir.program import NodeInfo, Program, Symbols, Weights
from foveate.ir.rewriter import Rewriter
from foveate.ir.weights import permute, read_weight, slice_weight, weight_name
from tests.ir.programs import traced

aten = torch.ops.aten
HERE = NodeInfo(0, "fused_proj", "visual")
WEIGHT = torch.arange(40.0).reshape(8, 5)
BIAS = torch.arange(8.0)


def made(*rows: int, device: str = "cpu") -> tuple[Program, Rewriter, fx.Node]:
    """A program with one linear over these rows of the weight (over all, if none are given)."""
    weights = Weights()
    weights.put("proj.weight", nn.Parameter(WEIGHT.to(device)))
    weights.put("proj.bias", BIAS.to(device))
    program = Program(traced()[1].info, weights, Symbols())
    edit = Rewriter(program, fx.Graph(), by="test")
    x = edit.placeholder(
        "x", program.symbols.tensor("batch", 5, dtype=torch.float32, device=torch.device(device)), HERE
    )
    parts: list[Any] = [edit.weight("proj.weight"), edit.weight("proj.bias")]
    if rows:
        parts = [edit.call(aten.slice.Tensor, part, 0, *rows, about=HERE) for part in parts]
    linear = edit.call(aten.linear.default, x, *parts, about=HERE)
    edit.output({"out": linear})
    return program, edit, linear


def result(program: Program, edit: Rewriter) -> Tensor:
    edit.refresh()
    edit.sweep()
    out: Tensor = fx.GraphModule(program.weights, edit.graph)(torch.eye(5))["out"]
    return out.detach()


@pytest.mark.parametrize(("rows", "part"), [((), (0, 8)), ((2, 6), (2, 6)), ((5, 8), (5, 8))])
def test_a_linear_reads_its_part_and_knows_the_name(rows: tuple[int, ...], part: tuple[int, int]) -> None:
    program, edit, linear = made(*rows)
    assert weight_name(linear) == "proj.weight"
    assert torch.equal(read_weight(program, linear), WEIGHT[slice(*part)])
    slice_weight(edit, linear, 0, 2)
    slice_weight(edit, linear, 1, 3)
    assert weight_name(linear) == "proj.weight"
    assert torch.equal(read_weight(program, linear), WEIGHT[part[0] : part[0] + 2, :3])


@pytest.mark.parametrize(("rows", "start"), [((), 0), ((2, 6), 2), ((5, 8), 5)])
def test_a_cut_keeps_the_first_outputs_of_the_part_and_their_bias(rows: tuple[int, ...], start: int) -> None:
    program, edit, linear = made(*rows)
    slice_weight(edit, linear, 0, 2)
    assert torch.equal(result(program, edit), WEIGHT.T[:, start : start + 2] + BIAS[start : start + 2])


def test_an_order_moves_the_rows_of_the_part_alone_and_leaves_the_original() -> None:
    program, edit, linear = made(2, 6)
    original = program.weights.get("proj.weight")
    permute(program, linear, torch.tensor([3, 1, 0, 2]), 0)
    moved = [0, 1, 5, 3, 2, 4, 6, 7]
    assert torch.equal(program.weights.get("proj.weight"), WEIGHT[moved])
    assert torch.equal(program.weights.get("proj.bias"), BIAS[moved])
    assert torch.equal(original, WEIGHT)
    assert isinstance(program.weights.get("proj.weight"), nn.Parameter)
    assert torch.equal(result(program, edit), WEIGHT.T[:, moved[2:6]] + BIAS[moved[2:6]])


def test_an_order_of_inputs_leaves_the_bias() -> None:
    program, _, linear = made()
    permute(program, linear, torch.tensor([4, 0, 1, 2, 3]), 1)
    assert torch.equal(program.weights.get("proj.weight"), WEIGHT[:, [4, 0, 1, 2, 3]])
    assert torch.equal(program.weights.get("proj.bias"), BIAS)


@pytest.mark.parametrize(("rows", "entries"), [((), 8), ((2, 6), 4)])
def test_an_order_of_another_length_is_refused(rows: tuple[int, ...], entries: int) -> None:
    program, _, linear = made(*rows)
    with pytest.raises(PassError, match=rf"proj.weight has {entries} entries on axis 0, the order has 3"):
        permute(program, linear, torch.tensor([0, 1, 2]), 0)


def test_without_weights_nothing_is_moved() -> None:
    program, _, linear = made(2, 6, device="meta")
    before = program.weights.get("proj.weight")
    permute(program, linear, torch.tensor([3, 1, 0, 2]), 0)
    assert program.weights.get("proj.weight") is before
