"""Which form computes a call, by predicted time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from foveate.neighborhood.grids import Call, Grids
from foveate.neighborhood.layouts import Block, Tiles, blocks, tiles

SHAPES = [
    (rows, columns) for rows in (1, 2, 4, 8, 16, 32) for columns in (1, 2, 4, 8, 16, 32) if 8 <= rows * columns <= 64
]
"""Tiles to choose from: rows and columns of queries."""

PATCH = (8, 8)
"""Queries of one Triton program."""

DENSE_ON_GPU = 1024
"""Up to so many tokens a GPU is done with one dense call before anything else has been launched."""


@dataclass(frozen=True)
class Plan:
    """The form that computes a call and its layout; of the other forms, why they do not.

    `pairs` counts what the form's products span: query-key pairs of one head, over the whole batch. So the FLOPs are
    4 * heads * size * pairs.
    """

    form: str
    layout: Tiles | tuple[Block, ...]
    pairs: int
    rejected: tuple[tuple[str, str], ...]

    def explain(self) -> str:
        """What was chosen, how it cuts the call, and why the other forms were not: a line a form."""
        cut = self.layout
        if isinstance(cut, Tiles):
            how = f"{cut.count} tiles of {cut.rows} x {cut.columns} queries and {cut.keys} keys"
        else:
            how = f"{len(cut)} blocks of queries"
        return "\n".join([f"{self.form}: chosen, {how}", *(f"{form}: {reason}" for form, reason in self.rejected)])


@dataclass(frozen=True)
class Costs:
    """Nanoseconds on one thread: of a chunk or block, of one head's piece of it, and of each product and score."""

    call: float
    piece: float
    product: float
    score: float
    copied: float
    masked: float


COSTS = {
    torch.float32: Costs(20e3, 1000, 0.025, 0.5, 0.3, 3.0),
    torch.bfloat16: Costs(20e3, 1000, 0.025, 0.5, 0.2, 3.0),
}


@lru_cache(maxsize=4096)
def plan(call: Call, grids: Grids | None, triton: bool = False) -> Plan:
    """The form for a call whose images are `grids`, None where nothing is promised. `triton`: is that form there?"""
    dense = blocks(call, grids)
    options: dict[str, Tiles | tuple[Block, ...]] = {"blocks": dense}
    rejected: dict[str, str] = {}
    if grids is None:
        rejected["tiles"] = rejected["triton"] = "no grid is promised: only the run knows whose neighbour a token is"
    else:
        options["tiles"] = min((tiles(call, grids, *x) for x in SHAPES), key=lambda x: tiles_time(call, x))
        if call.device == "cuda" and triton:
            options["triton"] = tiles(call, grids, *PATCH)
        else:
            rejected["triton"] = "is not installed" if call.device == "cuda" else f"does not run on {call.device}"
    if call.device == "cpu":
        times = {"blocks": blocks_time(call, dense)}
        if isinstance(cut := options.get("tiles"), Tiles):
            times["tiles"] = tiles_time(call, cut)
        form = min(times, key=times.__getitem__)
        why = {x: f"predicted {ns / 1e6:.2f} ms, {form} {times[form] / 1e6:.2f} ms" for x, ns in times.items()}
    else:
        small = call.tokens <= DENSE_ON_GPU
        form = "blocks" if small else next(x for x in ("triton", "tiles", "blocks") if x in options)
        reason = f"up to {DENSE_ON_GPU} tokens one dense call is done first" if small else f"{form} is faster on a GPU"
        why = dict.fromkeys(options, reason)
    rejected |= {x: reason for x, reason in why.items() if x != form}
    layout = options[form]
    pairs = layout.pairs if isinstance(layout, Tiles) else sum(block.pairs for block in layout)
    return Plan(form, layout, pairs, tuple(sorted(rejected.items())))


def tiles_time(call: Call, cut: Tiles) -> float:
    """Predicted nanoseconds of tiles."""
    costs = COSTS.get(call.dtype, COSTS[torch.float32])
    scores = call.heads * cut.pairs
    copied = 2 * cut.count * call.size * (call.kv_heads * cut.keys + call.heads * cut.queries)
    chunks, pieces = -(-cut.count // cut.step), cut.count * call.kv_heads
    return (
        chunks * costs.call
        + pieces * costs.piece
        + scores * (costs.score + call.size * costs.product)
        + copied * costs.copied
    )


def blocks_time(call: Call, cut: tuple[Block, ...]) -> float:
    """Predicted nanoseconds of blocks."""
    costs = COSTS.get(call.dtype, COSTS[torch.float32])
    pairs = sum(block.pairs / (2 if block.kind == "causal" else 1) for block in cut)
    masked = sum(block.pairs for block in cut if block.kind == "mask")
    scores = call.heads * pairs
    return len(cut) * costs.call + scores * (costs.score + call.size * costs.product) + masked * costs.masked
