"""Which form computes a call, by predicted time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from foveate.neighborhood.grids import Call, Grids
from foveate.neighborhood.layouts import Block, Tiles, blocks, tiles
from foveate.neighborhood.times import blocks_time, tiles_time

_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 64)
SHAPES = [(rows, columns) for rows in _SIDES for columns in _SIDES if 8 <= rows * columns <= 64]
"""Tiles to choose from: rows and columns of queries."""

BLOCKS = (64, 192)
"""Blocks to choose from: queries, about. The CPU's kernel takes larger stripes of them from 192 on."""

BLOCK_ON_GPU = 1024
"""A GPU would rather launch one large block than several small ones."""

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


@lru_cache(maxsize=256)
def plan(call: Call, grids: Grids | None, no_triton: str = "") -> Plan:
    """The form for a call whose images are `grids`, None where nothing is promised.

    no_triton: why that form cannot run here; empty if it can.
    """
    dense = blocks_layout(call, grids)
    options: dict[str, Tiles | tuple[Block, ...]] = {"blocks": dense}
    rejected: dict[str, str] = {}
    if grids is None:
        rejected["tiles"] = rejected["triton"] = "no grid is promised: only the run knows whose neighbour a token is"
    else:
        options["tiles"] = tiles_layout(call, grids)
        if no_triton or call.device != "cuda":
            rejected["triton"] = no_triton or f"does not run on {call.device}"
        else:
            options["triton"] = tiles(call, grids, *PATCH)
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


def blocks_layout(call: Call, grids: Grids | None) -> tuple[Block, ...]:
    """The best blocks."""
    sizes = BLOCKS if call.device == "cpu" else (BLOCK_ON_GPU,)
    return min((blocks(call, grids, size) for size in sizes), key=lambda x: blocks_time(call, x))


def tiles_layout(call: Call, grids: Grids) -> Tiles:
    """The best tiles. Those of whole rows need no keys beside them."""
    widest = max(call.laid(grid)[1] for grid in grids)
    shapes = [*SHAPES, *((rows, widest) for rows in (1, 2, 4) if rows * widest <= 256)]
    return min((tiles(call, grids, *shape) for shape in shapes), key=lambda x: tiles_time(call, x))
