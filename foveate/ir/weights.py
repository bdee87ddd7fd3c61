"""Slices and orders of weights: a slice is a view in the graph, an order is a copy that replaces the original.

A linear may read a part of a weight only: rows of a fused one, or what a pass left of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn

from foveate.errors import PassError
from foveate.ir.program import Program, args_of
from foveate.ir.rewriter import Rewriter, shape

aten = torch.ops.aten


def weight_name(linear: fx.Node) -> str:
    """Name of the weight of a linear."""
    return str(weight_part(linear)[0].target)


def linear_weights(program: Program) -> list[str]:
    """Names of the matrices that linears alone read, whole or in part; the token embedding is none of them."""
    found: dict[str, None] = {}
    for graph in program.graphs.values():
        for node in graph.nodes:
            if node.op == "call_function" and node.target == aten.linear.default and (part := linear_part(node)):
                found[part[0]] = None
    return [name for name in found if name != program.info.paths["embed"]]


def linear_part(linear: fx.Node) -> tuple[str, slice, slice] | None:
    """The weight, its rows and its columns that a linear reads; None where it is no slice of a matrix."""
    node = args_of(linear)[1]
    while isinstance(node, fx.Node) and node.target == aten.slice.Tensor:
        node = args_of(node)[0]
    if not isinstance(node, fx.Node) or node.op != "get_attr" or len(shape(node)) != 2:
        return None
    _, part = weight_part(linear)
    return str(node.target), slice(*part[0]), slice(*part[1])


def read_weight(program: Program, linear: fx.Node) -> Tensor:
    """The part of its weight that a linear reads, detached: a view."""
    node, part = weight_part(linear)
    weight = program.weights.get(str(node.target)).detach()
    return weight[tuple(slice(start, stop) for start, stop in part)]


def weight_part(linear: fx.Node) -> tuple[fx.Node, list[tuple[int, int]]]:
    """The whole weight behind a linear, and the range of each axis that slices leave of it."""
    slices: list[tuple[int, int, int]] = []
    node = args_of(linear)[1]
    while isinstance(node, fx.Node) and node.target == aten.slice.Tensor:
        node, dim, start, stop = args_of(node)
        slices.append((dim, start, stop))
    assert isinstance(node, fx.Node) and node.op == "get_attr"
    part = [(0, int(size)) for size in shape(node)]
    for dim, start, stop in reversed(slices):
        first, last = part[dim]
        part[dim] = (first + start, min(first + stop, last))
    return node, part


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


def permute(program: Program, linear: fx.Node, order: Tensor, dim: int) -> None:
    """Reorder what a linear reads of its weight along `dim` (and of its bias, for dim 0) in this program.

    The rest of a fused weight stays as it is, and the model the weight came from keeps its own.
    """
    node, part = weight_part(linear)
    name, (start, stop) = str(node.target), part[dim]
    names = [name]
    bias = name.removesuffix("weight") + "bias"
    if dim == 0 and bias in program.weights.names:
        names.append(bias)
    for each in names:
        old = program.weights.get(each)
        if stop - start != order.numel():
            raise PassError(f"{each} has {stop - start} entries on axis {dim}, the order has {order.numel()}")
        if old.is_meta:
            continue
        places = torch.arange(old.shape[dim], device=old.device)
        places[start:stop] = start + order.to(old.device)
        new = old.detach().index_select(dim, places)
        program.weights.put(each, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
