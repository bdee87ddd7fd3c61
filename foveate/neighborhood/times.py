"""Predicted times of the forms on a CPU: to choose by, not to show; they are those of one machine."""

from __future__ import annotations

from foveate.neighborhood.grids import Call
from foveate.neighborhood.layouts import LANES, Block, Tiles

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
"""Of each element of the keys and values, for every stripe of queries that is multiplied with it."""
PER_COPIED = 0.175
"""Of each element gathered or scattered."""
PER_MASKED = {"mask": 11.0, "grid": 2.0, "all": 0.0, "causal": 0.0}
"""Of each element of the mask that is made for one block, by its kind."""
CAUSAL = 0.75
"""Share of a square that the causal kernel takes the time of."""


def tiles_time(call: Call, cut: Tiles) -> float:
    """Predicted nanoseconds of tiles."""
    group = call.heads // call.kv_heads
    copied = 2 * cut.count * call.size * (call.kv_heads * cut.keys + call.heads * cut.queries)
    packed = cut.count * call.kv_heads * call.size * cut.keys * _stripes(group * cut.queries)
    rows = cut.count * cut.queries
    work = _attention_time(call, rows, rows * (cut.keys % LANES), cut.pairs, packed)
    return work + copied * PER_COPIED + -(-cut.count // cut.step) * PER_CHUNK


def blocks_time(call: Call, cut: tuple[Block, ...]) -> float:
    """Predicted nanoseconds of blocks."""
    rows = sum(block.rows for block in cut)
    left_over = sum(block.rows * (block.width % LANES) for block in cut)
    pairs = sum(block.pairs * (CAUSAL if block.kind == "causal" else 1) for block in cut)
    masked = sum(block.pairs * PER_MASKED[block.kind] for block in cut)
    packed = sum(block.width * _stripes(block.stop - block.start) * (block.batch[1] - block.batch[0]) for block in cut)
    work = _attention_time(call, rows, left_over, pairs, packed * call.heads * call.size)
    return work + masked + len(cut) * PER_BLOCK


def _stripes(queries: int) -> int:
    """Pieces that the CPU's kernel cuts so many queries of one head into."""
    return -(-queries // (32 if queries < 192 else 64 if queries < 768 else 256))


def _attention_time(call: Call, rows: int, left_over: int, pairs: float, packed: float) -> float:
    """Of the products and the softmax of so many queries, over all heads."""
    scores = rows * PER_ROW + left_over * PER_LEFT_OVER + pairs * call.size * PER_PRODUCT
    return call.heads * scores + packed * PER_PACKED
