"""Which form computes a call, by predicted time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from foveate.neighborhood.grids import Call, Grids
from foveate.neighborhood.layouts import LANES, Block, Tiles, blocks, tiles

_SIDES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 64)
SHAPES = [(rows, columns) for rows in _SIDES for columns in _SIDES if 8 <= rows * columns <= 64]
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


# Nanoseconds on one thread of a CPU, fitted to 2513 measured runs of both forms with random options (images of 12 to 66
# columns, radius 1 to 13, 8 to 28 heads of 64 or 128, grouped or not, text or not, fp32 and bf16, which differ little):
# processor time on an EPYC 9004, the second best of five. Half of all predictions are within 9%.
PER_CHUNK = 25e3
"""Of a chunk of tiles, besides its work: a dozen small ops."""
PER_BLOCK = 60e3
"""Of a block, the same."""
PER_ROW = 160.0
"""Of each query of each head: its softmax, however few keys there are."""
PER_LEFT_OVER = 16.0
"""Of each score behind the last whole vector of a query."""
PER_PRODUCT = 0.05
"""Of each multiplication with a key and its value."""
PER_PACKED = 0.375
"""Of each element of the keys and values, for every `STRIPE` queries that are multiplied with it."""
PER_COPIED = 0.175
"""Of each element gathered or scattered."""
PER_MASKED = {"mask": 11.0, "grid": 2.0, "all": 0.0, "causal": 0.0}
"""Of each element of the mask that is made for one block, by its kind."""
STRIPE = 32
CAUSAL = 0.75
"""Share of a square that the causal kernel takes the time of."""


@lru_cache(maxsize=4096)
def plan(call: Call, grids: Grids | None, no_triton: str = "") -> Plan:
    """The form for a call whose images are `grids`, None where nothing is promised.

    no_triton: why that form cannot run here; empty if it can.
    """
    dense = blocks(call, grids)
    options: dict[str, Tiles | tuple[Block, ...]] = {"blocks": dense}
    rejected: dict[str, str] = {}
    if grids is None:
        rejected["tiles"] = rejected["triton"] = "no grid is promised: only the run knows whose neighbour a token is"
    else:
        options["tiles"] = min(
            (tiles(call, grids, *x) for x in _shapes(call, grids)), key=lambda x: tiles_time(call, x)
        )
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


def _shapes(call: Call, grids: Grids) -> list[tuple[int, int]]:
    """Tiles to choose from: rows and columns of queries. Whole rows need no keys beside them."""
    widest = max(call.laid(grid)[1] for grid in grids)
    return [*SHAPES, *((rows, widest) for rows in (1, 2, 4) if rows * widest <= 256)]


def tiles_time(call: Call, cut: Tiles) -> float:
    """Predicted nanoseconds of tiles."""
    group = call.heads // call.kv_heads
    copied = 2 * cut.count * call.size * (call.kv_heads * cut.keys + call.heads * cut.queries)
    packed = cut.count * call.kv_heads * call.size * cut.keys * -(-group * cut.queries // STRIPE)
    rows = cut.count * cut.queries
    work = _attention_time(call, rows, rows * (cut.keys % LANES), cut.pairs, packed)
    return work + copied * PER_COPIED + -(-cut.count // cut.step) * PER_CHUNK


def blocks_time(call: Call, cut: tuple[Block, ...]) -> float:
    """Predicted nanoseconds of blocks."""
    rows = sum(block.rows for block in cut)
    left_over = sum(block.rows * (block.width % LANES) for block in cut)
    pairs = sum(block.pairs * (CAUSAL if block.kind == "causal" else 1) for block in cut)
    masked = sum(block.pairs * PER_MASKED[block.kind] for block in cut)
    work = _attention_time(call, rows, left_over, pairs, call.heads * call.size * pairs / STRIPE)
    return work + masked + len(cut) * PER_BLOCK


def _attention_time(call: Call, rows: int, left_over: int, pairs: float, packed: float) -> float:
    """Of the products and the softmax of so many queries, over all heads."""
    scores = rows * PER_ROW + left_over * PER_LEFT_OVER + pairs * call.size * PER_PRODUCT
    return call.heads * scores + packed * PER_PACKED
