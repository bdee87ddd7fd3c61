"""Slices and orders of weights: a slice is a view in the graph, an order is a copy that replaces the original."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from foveate.errors import PassError
from foveate.ir.program import Program
from foveate.ir.rewriter import Rewriter

aten = torch.ops.aten


def weight_of(linear: fx.Node) -> fx.Node:
    """The whole weight behind a linear, slices aside."""
    node = linear.args[1]
    while isinstance(node, fx.Node) and node.target == aten.slice.Tensor:
        node = node.args[0]
    assert isinstance(node, fx.Node) and node.op == "get_attr"
    return node


def weight_name(linear: fx.Node) -> str:
    """Name of the weight of a linear."""
    return str(weight_of(linear).target)


def slice_weight(edit: Rewriter, linear: fx.Node, dim: int, stop: int) -> None:
    """Let a linear use the first `stop` outputs (dim 0, bias too) or inputs (dim 1) of its weight."""
    source, _, *bias = linear.args
    about = linear.meta["foveate"].with_(by=edit.by, stream="none", origin=(linear.name,))
    with edit.before(linear):
        weight = edit.call(aten.slice.Tensor, linear.args[1], dim, 0, stop, about=about)
        if bias and bias[0] is not None and dim == 0:
            bias = [edit.call(aten.slice.Tensor, bias[0], 0, 0, stop, about=about)]
    # Inputs may still have their old width here; `refresh` settles the shapes once the whole layer is edited.
    linear.args = (source, weight, *bias)
    edit.events["changed"] += 1


def permute(program: Program, name: str, order: Tensor, dim: int) -> None:
    """Reorder a weight along `dim` (and its bias, for dim 0) in this program; the model it came from keeps its own."""
    names = [name]
    bias = name.removesuffix("weight") + "bias"
    if dim == 0 and bias in program.weights.names:
        names.append(bias)
    for each in names:
        old = program.weights.get(each)
        if old.shape[dim] != order.numel():
            raise PassError(f"{each} has {old.shape[dim]} entries on axis {dim}, the order has {order.numel()}")
        if old.is_meta:
            continue
        new = old.detach().index_select(dim, order.to(old.device))
        program.weights.put(each, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
