"""Prompts of very different lengths in one batch, run in groups, so that padding is not computed.

    lengths 2304, 64, 64, 80    ->    [2304], [64, 64, 80]    ->    logits and caches of one batch again

Rows do not see each other, so a group's results are those of the batch; only keys are padded in the end, which costs
memory and no arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.backends.base import Runner
from foveate.ops import PAD
from foveate.streams import contiguous_prefix

OVERHEAD = {"cpu": 64, "cuda": 512}
"""What one more run of a graph costs, in tokens: weights are read again, and kernels started."""


def groups(visual: Tensor, text: Tensor, overhead: int) -> list[list[int]]:
    """Rows that are cheapest to run together; visual, text: int64 [B], tokens of each row.

    A group costs rows x (most visual + most text tokens) + overhead; rows that stand together by length are tried.
    """
    lengths = list(zip(visual.tolist(), text.tolist(), strict=True))
    order = sorted(range(len(lengths)), key=lambda row: (sum(lengths[row]), lengths[row]))
    best, cuts = [0.0], [0]
    for stop in range(1, len(order) + 1):
        most_visual = most_text = 0
        found, where = float("inf"), 0
        for start in range(stop - 1, -1, -1):
            v, t = lengths[order[start]]
            most_visual, most_text = max(most_visual, v), max(most_text, t)
            cost = best[start] + (stop - start) * (most_visual + most_text) + overhead
            if cost < found:
                found, where = cost, start
        best.append(found)
        cuts.append(where)
    result, stop = [], len(order)
    while stop:
        result.append(sorted(order[cuts[stop] : stop]))
        stop = cuts[stop]
    return result[::-1]


def run_in_groups(run: Runner, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a prefill graph returns for a batch, run in the groups that cost least."""
    visual, text = ((inputs[f"{name}_order"] != PAD).sum(1) for name in ("visual", "text"))
    found = groups(visual.cpu(), text.cpu(), OVERHEAD.get(visual.device.type, 64))
    if len(found) == 1:
        return run(inputs)
    outs = [run(rows_of(inputs, rows)) for rows in found]
    back = torch.tensor([row for rows in found for row in rows], device=visual.device).argsort()
    return merged(outs, back)


def rows_of(inputs: Mapping[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The inputs of some rows alone, without the columns that are padding in all of them."""
    index = torch.tensor(rows, device=inputs["text_order"].device)
    orders = {name: inputs[f"{name}_order"][index] for name in ("visual", "text")}
    width = int((orders["visual"] != PAD).sum(1).max())
    dropped = orders["text"].shape[1] - int((orders["text"] != PAD).sum(1).max())
    columns = {"visual": slice(0, width), "text": slice(dropped, None)}
    taken: dict[str, Any] = {}
    for name, value in inputs.items():
        part = columns.get(name.partition("_")[0])
        if name.endswith("_position_ids"):
            taken[name] = value.index_select(-2, index)[..., part]
        elif part is not None:
            taken[name] = value[index][:, part].contiguous()
    taken["prefix"] = contiguous_prefix(taken["visual_order"], taken["text_order"])
    grids = inputs["grids"]
    mine = torch.isin(grids[:, 0], index.cpu())
    moved = grids[mine].clone()
    moved[:, 0] = torch.searchsorted(index.cpu(), moved[:, 0].contiguous())
    moved[:, 4:] -= dropped
    return {**taken, "grids": moved}


def merged(outs: Sequence[Mapping[str, Any]], back: Tensor) -> dict[str, Any]:
    """The results of groups as those of one batch, whose row i stands at back[i] in the groups one after another."""

    def rows(values: Sequence[Tensor | None], axis: int, fill: int = 0, left: bool = False) -> Tensor | None:
        if values[0] is None:
            return None
        widest = max(value.shape[axis] for value in values if value is not None)
        wide = []
        for value in values:
            assert value is not None  # groups run the same graph
            shape = list(value.shape)
            shape[axis] = widest - shape[axis]
            more = value.new_full(shape, fill)  # not by pad, which takes its value for a float
            wide.append(torch.cat([more, value] if left else [value, more], axis))
        return torch.cat(wide).index_select(0, back)

    kv = []
    for layer in zip(*(out["kv"] for out in outs), strict=True):
        parts = list(zip(*layer, strict=True))
        kv.append([rows(part, 2, left=place > 1) for place, part in enumerate(parts)])
    kept = {layer: rows([out["kept"][layer] for out in outs], 1, PAD) for layer in outs[0]["kept"]}
    return {"logits": rows([out["logits"] for out in outs], 1), "kv": kv, "kept": kept}
