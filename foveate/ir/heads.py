"""Arranging attention heads so that every kept part is a slice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from foveate.ir.program import NodeInfo
from foveate.ir.rewriter import Rewriter, shape

aten = torch.ops.aten


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
