"""What a `foveate::neighbor_attention` node computes: the very plan that the kernels make of the call."""

from __future__ import annotations

import math

from torch import fx

from foveate.ir.attention import Neighbors
from foveate.ir.cost.sizes import Sizes
from foveate.neighborhood import Call, Grid, Grids, plan


def neighbor_flops(node: fx.Node, sizes: Sizes, kind: str) -> int:
    """FLOPs of the form that is chosen for this call on a device of that kind, `cpu` or `cuda`."""
    about = Neighbors.of(node)
    batch, heads, tokens, size = sizes.shape(about.q)
    text = sizes.shape(about.k[1])[2] if len(about.k) > 1 else 0
    call = Call(
        kind,
        about.q.meta["val"].dtype,
        batch,
        heads,
        sizes.shape(about.k[0])[1],
        size,
        tokens,
        text,
        about.radius,
        about.metric,
        about.causal,
    )
    if not batch * heads * tokens:
        return 0
    no_triton = "takes distances on the grid only" if about.metric == "raster" else ""
    return 4 * heads * size * plan(call, image_grids(sizes, batch, tokens, text), no_triton).pairs


def image_grids(sizes: Sizes, batch: int, tokens: int, text: int) -> Grids | None:
    """The images of a batch, alike in every row; None where tokens are missing, so that no grid is promised."""
    images = sizes.names["images"] // batch
    if sizes.shortened or tokens != sizes.names["visual_tokens"] or not images or not tokens or tokens % images:
        return None
    height, width = _grid(tokens // images, sizes.grid)
    prefix = sizes.names["prefix"]
    # Of the text between several images, each sees what stands before it; a text key is in both counts or in none.
    seen = [min(text, prefix) if prefix >= 0 else text * (i + 1) // (images + 1) for i in range(images)]
    return tuple(
        Grid(row, i * height * width, height, width, 0, seen[i]) for row in range(batch) for i in range(images)
    )


def _grid(tokens: int, usual: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of an image: the model's own, or for another number of tokens the squarest there are."""
    if tokens == usual[0] * usual[1]:
        return usual
    height = next(h for h in range(math.isqrt(tokens), 0, -1) if tokens % h == 0)
    return height, tokens // height
