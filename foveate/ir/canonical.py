"""One recorded op in canonical form: a new node, an old one where the op does nothing, or a list of them.

    view, reshape                 flatten, unflatten (which do not name the number of tokens)
    split, chunk, unbind          a slice, or a select, for each piece
    permute of two axes           transpose
    convolution in one position   linear
    convolution, padding "valid"  convolution without padding
    linear that is cut in parts   a linear for each part (`unfuse`)

What the analyses and the passes have to know is then a short list of ops, whichever way a model spells them.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import fx

from foveate.errors import TraceError
from foveate.ir.program import NodeInfo, args_of, info
from foveate.ir.rewriter import Rewriter, shape

aten = torch.ops.aten

_NOTHING = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
}
_SAME = {
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
}
_RESHAPE = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_CAST = {aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device}
_PIECES = {aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default}
_CONVOLUTIONS = {aten.conv2d.default, aten.conv3d.default}


def canonical(edit: Rewriter, node: fx.Node, args: Any, kwargs: Any, about: NodeInfo) -> Any:
    """What stands for a recorded node; args and kwargs are already those of the new graph."""
    op = node.target
    if op in _NOTHING:
        return None
    if op in _SAME or (op == aten.dropout.default and (args[1] == 0 or not args[2])):
        return args[0]
    if op in _RESHAPE:
        return _reshape(edit, node, args, about)
    if op in _CAST:
        dtype = next((a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.dtype)), None)
        same = dtype is None or args[0].meta["val"].dtype == dtype
        return args[0] if same else edit.call(aten.to.dtype, args[0], dtype, about=about)
    if op == aten.type_as.default:
        dtype = args[1].meta["val"].dtype
        return args[0] if args[0].meta["val"].dtype == dtype else edit.call(aten.to.dtype, args[0], dtype, about=about)
    if op in _PIECES or op == aten.unbind.int:
        return _pieces(edit, node, args, about)
    if op is operator.getitem:
        source, place = args
        return source[place] if isinstance(source, (list, tuple)) else edit.item(source, place, about)
    if not isinstance(op, torch._ops.OpOverload):
        raise TraceError(f"layer {about.layer}, {about.role}, node {node.name}: {op} is not an op that can be imported")
    if op == aten.matmul.default and shape(args[0])[-1] == 1 and shape(args[0])[:-2] == shape(args[1])[:-2]:
        # An outer product, as some versions write rotary angles, is elementwise and costs no matmul.
        return edit.call(aten.mul.Tensor, *args, about=about)
    if op == aten.permute.default and (swapped := _swapped(args[1])):
        return edit.call(aten.transpose.int, args[0], *swapped, about=about)
    if op in _CONVOLUTIONS and _covers_its_input(node):
        return _convolution(edit, args, about)
    if op == aten.conv2d.padding and (len(args) < 5 or args[4] == "valid"):
        return edit.call(aten.conv2d.default, *args[:4], *((0, *args[5:]) if args[5:] else ()), about=about, **kwargs)
    result = edit.call(op, *args, about=about, **kwargs)
    noop = op in (aten.slice.Tensor, aten.expand.default) and shape(result) == shape(args[0])
    if noop:
        edit.graph.erase_node(result)
        return args[0]
    return result


def _reshape(edit: Rewriter, node: fx.Node, args: Any, about: NodeInfo) -> fx.Node:
    """A view as `flatten` and `unflatten` of neighbouring axes, so that it holds for any number of tokens.

    Sound because a view keeps the order of the elements: between the leading and the trailing axes that both shapes
    have in common, what is left of one becomes what is left of the other.
    """
    source: fx.Node = args[0]
    recorded: Any = node.args[0]
    # Both shapes as the recording has them, so that symbolic sizes can be compared by name.
    old, new = ([_plain_size(s) for s in n.meta["val"].shape] for n in (recorded, node))
    # A size that was asked for is known, whatever the recording derives for it.
    asked = [s if isinstance(s, int) and s >= 0 else None for s in args_of(node)[1]]
    new = [s if wanted is None else wanted for s, wanted in zip(new, asked, strict=True)]
    old = [known if isinstance(known, int) else s for s, known in zip(old, shape(source), strict=True)]
    whole = f"{tuple(old)} -> {tuple(new)}"
    if len(old) > len(new) > 0 and old[0] == 1 and old[1] == new[0]:
        source, old = edit.call(aten.select.int, source, 0, 0, about=about), old[1:]
    if old == new:
        return source
    at = 0
    while min(len(old), len(new)) > 1 and old[0] == new[0]:
        at, old, new = at + 1, old[1:], new[1:]
    while min(len(old), len(new)) > 1 and old[-1] == new[-1]:
        old, new = old[:-1], new[:-1]
    known = all(isinstance(s, int) for s in (*old, *new))
    if len(old) == 1 and len(new) > 1 and known and old[0] == math.prod(new):
        return edit.call(aten.unflatten.int, source, at, new, about=about)
    if len(new) == 1 and len(old) > 1 and known and new[0] == math.prod(old):
        return _flatten(edit, source, at, at + len(old) - 1, about)
    if len(old) == len(new) == 2 and isinstance(old[1], int) and isinstance(new[1], int) and new[1] % old[1] == 0:
        # Several rows become one: [n, c] -> [n / r, r c].
        rows = new[0] if isinstance(new[0], int) else -1
        source = edit.call(aten.unflatten.int, source, at, [rows, new[1] // old[1]], about=about)
        return _flatten(edit, source, at + 1, at + 2, about)
    raise TraceError(f"layer {about.layer}, {about.role}, node {node.name}: cannot read the reshape {whole}")


def _flatten(edit: Rewriter, source: fx.Node, start: int, stop: int, about: NodeInfo) -> fx.Node:
    if source.target == aten.unflatten.int:
        before, dim, sizes = args_of(source)
        if dim == start and len(sizes) == stop - start + 1:
            assert isinstance(before, fx.Node)  # what unflatten takes
            return before
    return edit.call(aten.flatten.using_ints, source, start, stop, about=about)


def _plain_size(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _pieces(edit: Rewriter, node: fx.Node, args: Any, about: NodeInfo) -> list[fx.Node]:
    """Each result of `split`, `chunk` or `unbind`; a sweep removes those that nobody reads."""
    source = args[0]
    dim = (args[1] if len(args) > 1 else 0) if node.target == aten.unbind.int else args[2] if len(args) > 2 else 0
    dim %= len(shape(source))
    parts: Any = node.meta["val"]
    if node.target == aten.unbind.int:
        return [edit.call(aten.select.int, source, dim, i, about=about) for i in range(len(parts))]
    widths = [part.shape[dim] for part in parts]
    if not all(isinstance(w, int) for w in widths):
        raise TraceError(
            f"layer {about.layer}, {about.role}, node {node.name}: {node.target} cuts an axis of unknown size"
        )
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return [
        edit.call(aten.slice.Tensor, source, dim, end - width, end, about=about)
        for width, end in zip(widths, ends, strict=True)
    ]


def _swapped(order: Any) -> list[int]:
    """The two axes that a permutation swaps; empty if it does anything else."""
    rank = len(order)
    moved = [i for i, axis in enumerate(order) if axis % rank != i]
    return moved if len(moved) == 2 else []


def _covers_its_input(node: fx.Node) -> bool:
    """Whether a recorded convolution has one position: its kernel is its input, in one group, without padding."""
    given = args_of(node)
    kernel, image = given[1].meta["val"].shape, given[0].meta["val"].shape
    padding = given[4] if len(given) > 4 else 0
    groups = given[6] if len(given) > 6 else 1
    padded = any(padding) if isinstance(padding, (list, tuple)) else bool(padding)
    return bool(kernel[1:] == image[1:]) and groups == 1 and not padded


def _convolution(edit: Rewriter, args: Any, about: NodeInfo) -> fx.Node:
    """conv([n, c, ...], w [d, c, ...]) as linear([n, c * ...], w [d, c * ...]) -> [n, d, 1, ...]."""
    source, weight, *rest = args
    last = len(shape(source)) - 1
    flat = [_flatten(edit, x, 1, last, about) for x in (source, weight)]
    result = edit.call(aten.linear.default, *flat, *rest[:1], about=about)
    return edit.call(aten.unflatten.int, result, 1, [shape(weight)[0], *[1] * (last - 1)], about=about)


def unfuse(edit: Rewriter) -> None:
    """A linear whose users are slices of its outputs that together are the whole: one linear for each of them.

        y = linear(x, w)                        a = linear(x, w[:n])     role `self_attn.qkv_proj[0]`
        a, b = y[..., :n], y[..., n:]           b = linear(x, w[n:])     role `self_attn.qkv_proj[1]`

    Sound because an output of a linear depends on one row of its weight. The rows are views of one weight.
    """
    for node in list(edit.graph.nodes):
        if node.op != "call_function" or node.target != aten.linear.default or not node.users:
            continue
        width = int(shape(node)[-1])
        cuts = {user: _cut(user, len(shape(node)) - 1, width) for user in node.users}
        ranges = sorted({cut for cut in cuts.values() if cut})
        bounds = [0, *(stop for _, stop in ranges)]
        tiled = [start for start, _ in ranges] == bounds[:-1] and bounds[-1] == width
        if len(ranges) < 2 or None in cuts.values() or not tiled:
            continue
        source, weight, *bias = args_of(node)
        for place, (start, stop) in enumerate(ranges):
            about = info(node).with_(role=f"{info(node).role}[{place}]")
            with edit.before(node):
                rows = [b and edit.call(aten.slice.Tensor, b, 0, start, stop, about=about) for b in (weight, *bias)]
                part = edit.call(aten.linear.default, source, *rows, about=about)
            for user, cut in cuts.items():
                if cut == (start, stop):
                    edit.replace(user, part)
    edit.sweep()


def _cut(user: fx.Node, axis: int, width: int) -> tuple[int, int] | None:
    """The range of `axis` that a node is a slice of; None for anything but a plain slice."""
    if user.target != aten.slice.Tensor:
        return None
    given, defaults = args_of(user)[1:], (0, None, None, 1)
    values: list[Any] = [*given, *defaults[len(given) :]]
    dim, start, stop, step = values
    if dim % (axis + 1) != axis or step != 1:
        return None
    return slice(start, stop).indices(width)[:2]
