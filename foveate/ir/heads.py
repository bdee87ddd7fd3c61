"""Attention heads: arranging them so that every kept part is a slice, and dropping the rest for visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from foveate import ops
from foveate.errors import PassError
from foveate.ir.attention import Attention, attentions, taken_apart
from foveate.ir.program import NodeInfo, Stream, args_of, info, outputs
from foveate.ir.rewriter import Rewriter, nodes_of, shape
from foveate.ir.weights import permute, slice_weight

aten = torch.ops.aten


READERS = (ops.attention_row, ops.rater_scores, ops.rater_rank, ops.received_attention)
"""Scores that read a layer's queries, first, and its keys, second."""


@dataclass(frozen=True)
class HeadPlan:
    """Which query heads of a layer stay for visual tokens, and the order that puts them in front.

    order: all query heads, kept first; kv_order: all key heads, those that a kept head reads first.
    kept_kv, dropped_kv: for each kept and each dropped query head, its key head's place in `kv_order`.
    """

    order: tuple[int, ...]
    kv_order: tuple[int, ...]
    kept_kv: tuple[int, ...]
    dropped_kv: tuple[int, ...]

    @property
    def kept(self) -> int:
        """How many query heads stay."""
        return len(self.kept_kv)

    @property
    def kv(self) -> int:
        """How many key heads visual tokens still need: a key head goes only when its whole group goes."""
        return len(set(self.kept_kv))


def plan_heads(keep: Sequence[bool], kv_heads: int) -> HeadPlan:
    """The plan for one layer: keep[h] says whether query head h stays; heads h of one key head are neighbours."""
    group = len(keep) // kv_heads
    kept = [h for h, stays in enumerate(keep) if stays]
    dropped = [h for h, stays in enumerate(keep) if not stays]
    read = sorted({h // group for h in kept})
    kv_order = [*read, *(j for j in range(kv_heads) if j not in read)]
    place = {j: i for i, j in enumerate(kv_order)}
    return HeadPlan(
        (*kept, *dropped),
        tuple(kv_order),
        tuple(place[h // group] for h in kept),
        tuple(place[h // group] for h in dropped),
    )


def expand_order(order: Sequence[int], head_dim: int) -> Tensor:
    """An order of heads as an order of the rows (or columns) of a projection."""
    return (torch.tensor(order)[:, None] * head_dim + torch.arange(head_dim)).flatten()


def heads_for(edit: Rewriter, key: fx.Node, wanted: Sequence[int], about: NodeInfo) -> fx.Node:
    """A key or value [B, Hk, n, e] so that plain grouping pairs query head i with key head wanted[i].

    A slice where `wanted` walks through neighbouring key heads in equal groups; otherwise one key head a query head.
    """
    distinct = list(dict.fromkeys(wanted))
    size = len(wanted) // len(distinct)
    start, stop = distinct[0], distinct[-1] + 1
    if distinct == list(range(start, stop)) and list(wanted) == [j for j in distinct for _ in range(size)]:
        whole = start == 0 and stop == int(shape(key)[1])
        return key if whole else edit.call(aten.slice.Tensor, key, 1, start, stop, about=about)
    parts = [edit.call(aten.slice.Tensor, key, 1, a, b, about=about) for a, b in _runs(wanted)]
    return parts[0] if len(parts) == 1 else edit.call(aten.cat.default, parts, 1, about=about)


def _runs(wanted: Sequence[int]) -> list[tuple[int, int]]:
    """Maximal runs of consecutive numbers, as (start, stop)."""
    runs: list[tuple[int, int]] = []
    for j in wanted:
        if runs and runs[-1][1] == j:
            runs[-1] = (runs[-1][0], j + 1)
        else:
            runs.append((j, j + 1))
    return runs


def drop_heads(edit: Rewriter, layer: int, plan: HeadPlan, renorm: bool = True) -> None:
    """Rewrite one layer of a split prefill graph so that visual tokens have the plan's heads only.

    renorm: in dropped heads text has a softmax over text keys alone; otherwise visual keys still take their share of
    attention, which is worth nothing: their values are zero.
    Raises PassError where heads are dropped already, or a selection needs a head that would go.
    """
    text, *more = attentions(edit.graph, layer, "text")
    if more or shape(Attention.of(text).q[0])[1] != edit.program.info.heads:
        raise PassError(f"{edit.by}: layer {layer} already has heads dropped")
    readers = _readers(Attention.of(text).k[0])
    if readers and not plan.kept:
        raise PassError(f"{edit.by}: a selection reads layer {layer}'s attention; keep at least one head there")
    _order_weights(edit, layer, plan)
    if plan.kept:
        _slice_projections(edit, layer, plan, renorm)
        for node in attentions(edit.graph, layer, "visual"):
            old = taken_apart(node)
            with edit.before(node):
                k, v = (_kept_keys(edit, xs, plan, node) for xs in (old.k, old.v))
            edit.set_args(node, replace(old, k=k, v=v).args)
        for row in readers:
            q, keys, *rest = args_of(row)
            with edit.before(row):
                if info(q).stream == "text":  # those of visual tokens are fewer already
                    q = edit.call(aten.slice.Tensor, q, 1, 0, plan.kept, about=_about(edit, row))
                keys = _kept_keys(edit, keys, plan, row)
            edit.set_args(row, (q, keys, *rest))
    else:
        _remove_visual(edit, layer, renorm)
    _split_text(edit, text, plan, renorm)
    edit.refresh(layer)


def _readers(key: fx.Node) -> list[fx.Node]:
    """Scores from attention to these keys, or to those that they were selected from by such a score."""
    keys = [key, *([args_of(key)[0]] if key.target == ops.take_tokens else [])]
    return [user for each in keys for user in each.users if user.target in READERS]


def _about(edit: Rewriter, node: fx.Node) -> NodeInfo:
    return info(node).with_(by=edit.by, origin=(node.name,))


def _linears(edit: Rewriter, layer: int, part: str, stream: Stream) -> list[fx.Node]:
    role = edit.program.info.roles[part]
    return nodes_of(edit.graph, stream=stream, role=role, layer=layer, op=aten.linear.default)


def _order_weights(edit: Rewriter, layer: int, plan: HeadPlan) -> None:
    size = edit.program.info.head_dim
    for part, order, dim in (
        ("q", plan.order, 0),
        ("k", plan.kv_order, 0),
        ("v", plan.kv_order, 0),
        ("o", plan.order, 1),
    ):
        if list(order) != sorted(order):
            permute(edit.program, _linears(edit, layer, part, "text")[0], expand_order(order, size), dim)


def _slice_projections(edit: Rewriter, layer: int, plan: HeadPlan, renorm: bool) -> None:
    size = edit.program.info.head_dim
    # Without renormalising every key is needed; values follow, because the cache holds as many of both.
    keys = plan.kv if renorm else edit.program.info.kv_heads
    for part, heads, dim in (("q", plan.kept, 0), ("k", keys, 0), ("v", keys, 0), ("o", plan.kept, 1)):
        for linear in _linears(edit, layer, part, "visual"):
            slice_weight(edit, linear, dim, heads * size)
            for user in list(linear.users) if dim == 0 else []:
                if user.target != aten.unflatten.int:
                    raise PassError(f"{edit.by}: layer {layer}: {user.name} reads all heads of {part} at once")
                user.args = (*user.args[:2], [heads, size])
    edit.refresh(layer)


def _kept_keys(edit: Rewriter, keys: Sequence[fx.Node], plan: HeadPlan, reader: fx.Node) -> list[fx.Node]:
    return [heads_for(edit, key, plan.kept_kv, _about(edit, reader)) for key in keys]


def _split_text(edit: Rewriter, node: fx.Node, plan: HeadPlan, renorm: bool) -> None:
    """Kept heads see both streams, dropped heads see text alone, or visual keys without values."""
    old, about = Attention.of(node), _about(edit, node)
    (q,) = old.q
    with edit.before(node):
        parts = []
        if plan.kept:
            query = edit.call(aten.slice.Tensor, q, 1, 0, plan.kept, about=about)
            k, v = (_kept_keys(edit, xs, plan, node) for xs in (old.k, old.v))
            parts.append(edit.call(ops.attention, *replace(old, q=[query], k=k, v=v).args, about=about))
            q = edit.call(aten.slice.Tensor, q, 1, plan.kept, len(plan.order), about=about)
        blind = old.without_visual() if renorm else replace(old, v=[old.k[0], *old.v[1:]])
        k, v = ([heads_for(edit, x, plan.dropped_kv, about) for x in xs] for xs in (blind.k, blind.v))
        if not renorm:
            v[0] = edit.call(aten.mul.Tensor, k[0], 0.0, about=about)
        parts.append(edit.call(ops.attention, *replace(blind, q=[q], k=k, v=v).args, about=about))
        joined = parts[0] if len(parts) == 1 else edit.call(aten.cat.default, parts, 2, about=about)
    edit.replace(node, joined)


def _remove_visual(edit: Rewriter, layer: int, renorm: bool) -> None:
    """No head is left: the residual stream passes the attention by; no visual keys are kept, if none are needed."""
    for linear in _linears(edit, layer, "o", "visual"):
        for add in list(linear.users):
            if add.target != aten.add.Tensor:
                raise PassError(f"{edit.by}: layer {layer}: {add.name} stands between attention and residual")
            residual = next(x for x in args_of(add)[:2] if x is not linear)
            bias = [b for b in args_of(linear)[2:] if b is not None]
            with edit.before(add):
                # What is left of a projection of nothing is its bias.
                new = edit.call(aten.add.Tensor, residual, bias[0], about=_about(edit, add)) if bias else residual
            edit.replace(add, new)
    if not renorm:
        return
    result = dict(outputs(edit.graph))
    entries = list(result["kv"])
    entries[layer] = [None, None, *entries[layer][2:]]
    edit.output({**result, "kv": entries})
