"""Tiles of queries whose keys are gathered by an index: every tile of every image in the batch, a chunk at a time.

Tables, made once for a set of grids, say which token stands at each place of each tile and which keys the tile sees;
a place outside its image points at token 0 and its result is thrown away. So images of any size run together, and the
op is a gather, a dense attention of small equal pieces with a mask, and a scatter. The query heads of one key head
stand below one another in a tile, so that its keys are read once for all of them.

In fp32 on several CPU threads the dense attention of a chunk is two batched products and a softmax. The fused kernel
multiplies such small pieces one by one, which two threads together do hardly faster than one. With other dtypes that
would round the scores.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.kernels.gradients import recorded
from foveate.kernels.neighbor.inputs import Inputs, added, near
from foveate.kernels.scratch import scratch
from foveate.neighborhood import Call, Grid, Grids, Tiles


@dataclass(frozen=True)
class Tables:
    """Where the tokens of each tile are, and what they see.

    queries [tiles, q] and keys [tiles, k] point at the tokens of the whole batch, text keys behind all visual ones;
    results [tiles, q] are the rows where the results go, one behind the last for those that mean nothing.
    masks [kinds, group * q, k] are added to scores; a tile is of the kind in kinds [tiles], and there are few.
    """

    queries: Tensor
    keys: Tensor
    results: Tensor
    kinds: Tensor
    masks: Tensor

    def some(self, part: slice) -> Tables:
        """Those of some tiles only."""
        return replace(self, **{name: getattr(self, name)[part] for name in ("queries", "keys", "results", "kinds")})

    def mask(self) -> Tensor:
        """What is added to the scores of each tile: [tiles, group * q, k]."""
        return self.masks.index_select(0, self.kinds)


def attend(x: Inputs, call: Call, grids: Grids | None, tiles: Tiles) -> Tensor:
    """`foveate::neighbor_attention` where the grids hold."""
    assert grids is not None  # the plan chooses tiles for grids only
    tables = _tables(call, grids, tiles, x.q.device)
    rows = _rows(x.q), _rows(*x.k), _rows(*x.v)
    out = (x.q.new_empty if call.filled(grids) else x.q.new_zeros)(len(rows[0]) + 1, rows[0].shape[1])
    attended = _products if _plain(x) else _fused
    # Each thread has a cache of its own.
    step = tiles.step * torch.get_num_threads()
    for start in range(0, tiles.count, step):
        attended(out, rows, tables.some(slice(start, start + step)), call, x.scale)
    return out[:-1].view(call.batch, call.tokens, call.heads, call.size)


Rows = tuple[Tensor, Tensor, Tensor]
"""Those of queries [tokens, H * e], of keys and of values [tokens, Hk * e]."""


def _rows(visual: Tensor, text: Tensor | None = None) -> Tensor:
    """Streams [B, H, n, e] as rows [B * n, H * e], those of text behind all others."""
    rows = visual.transpose(1, 2).flatten(0, 1).flatten(1)
    return rows if text is None or not text.shape[2] else torch.cat([rows, _rows(text)])


def _fused(out: Tensor, rows: Rows, some: Tables, call: Call, scale: float) -> None:
    """Write the results of some tiles to their rows of out [tokens + 1, H * e]."""
    q, k, v = (
        # [tiles * t, Hk * group * e] -> [tiles, Hk, group * t, e]
        each.index_select(0, index.flatten())
        .view(*index.shape, call.kv_heads, -1, call.size)
        .permute(0, 2, 3, 1, 4)
        .flatten(2, 3)
        for each, index in zip(rows, (some.queries, some.keys, some.keys), strict=True)
    )
    made = scaled_dot_product_attention(q, k, v, attn_mask=some.mask()[:, None], scale=scale)
    made = made.unflatten(2, (-1, some.queries.shape[1])).permute(0, 3, 1, 2, 4)
    out.index_copy_(0, some.results.flatten(), made.reshape(-1, out.shape[1]))


def _products(out: Tensor, rows: Rows, some: Tables, call: Call, scale: float) -> None:
    """As `_fused`, without gradients. Rows are those of one head here, which products need together."""
    queries, keys, values = (each.reshape(-1, call.size) for each in rows)
    asked, answered = (_parts(index, call, call.heads) for index in (some.queries, some.results))
    seen, mask = _parts(some.keys, call, call.kv_heads), some.mask()
    pieces = call.kv_heads * len(mask)
    q = queries.index_select(0, asked).view(pieces, -1, call.size)
    scores = scratch("scores", (pieces, *mask.shape[1:]), q)
    scores.view(call.kv_heads, *mask.shape).copy_(mask)
    # Values take the place of keys, once these have been multiplied.
    place = scratch("tile", (len(seen), call.size), q)
    tile = place.view(pieces, -1, call.size)
    torch.index_select(keys, 0, seen, out=place)
    torch.baddbmm(scores, q, tile.transpose(1, 2), alpha=scale, out=scores)
    torch.softmax(scores, -1, out=scores)
    torch.index_select(values, 0, seen, out=place)
    out.view(-1, call.size).index_copy_(0, answered, (scores @ tile).view(-1, call.size))


def _parts(index: Tensor, call: Call, heads: int) -> Tensor:
    """Where rows [tiles, t] of all heads are, head by head: one axis of key head, tile, head of its group, token."""
    head = torch.arange(heads, device=index.device).view(call.kv_heads, 1, -1, 1)
    return (heads * index[:, None] + head).flatten()


def _plain(x: Inputs) -> bool:
    """Whether products are the faster way, and compute the same."""
    if x.q.dtype != torch.float32 or x.q.device.type != "cpu" or torch.get_num_threads() == 1:
        return False
    return not recorded(x.q, *x.k, *x.v)


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _tables(call: Call, grids: Grids, tiles: Tiles, device: torch.device) -> Tables:
    """The tables of a set of grids; layers with the same options share them, in training too."""
    # Made on the CPU, whatever device the caller has made the default.
    with torch.device("cpu"):
        queries, keys = (torch.cat(part) for part in zip(*(_image(call, grid, tiles) for grid in grids), strict=True))
        # Who is near whom is the same in every tile; tiles differ by what lies outside their image.
        down = torch.arange(tiles.rows)[:, None] - torch.arange(tiles.span) + tiles.above
        right = torch.arange(tiles.columns)[:, None] - torch.arange(tiles.reach) + tiles.aside
        seen = near(down[:, None, :, None], right[None, :, None, :], call).flatten(2).flatten(0, 1)
        seen = torch.cat([seen, seen.new_ones(tiles.queries, tiles.text)], 1)
        inside, kinds = (keys >= 0).unique(dim=0, return_inverse=True)
        masks = added(seen & inside[:, None], call.dtype).repeat(1, call.heads // call.kv_heads, 1)
        results = queries.masked_fill(queries < 0, call.batch * call.tokens)
        parts = queries.clamp(min=0), keys.clamp(min=0), results, kinds, masks
    return Tables(*(part.to(device) for part in parts))


def _image(call: Call, grid: Grid, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """The tokens of the tiles of one image: queries [tiles, q] and keys [tiles, k], -1 where there is none."""
    height, width = call.laid(grid)
    top, left = torch.arange(0, height, tiles.rows)[:, None], torch.arange(0, width, tiles.columns)[:, None]
    first = grid.row * call.tokens + grid.start
    queries = _crossed(top + torch.arange(tiles.rows), left + torch.arange(tiles.columns), height, width, first)
    key_rows, key_columns = torch.arange(tiles.span) - tiles.above, torch.arange(tiles.reach) - tiles.aside
    keys = _crossed(top + key_rows, left + key_columns, height, width, first)
    place = torch.arange(tiles.text)
    text = call.batch * call.tokens + grid.row * call.text + grid.text_start + place
    text = text.masked_fill(place >= grid.text, -1).expand(len(keys), -1)
    return queries, torch.cat([keys, text], 1)


def _crossed(rows: Tensor, columns: Tensor, height: int, width: int, first: int) -> Tensor:
    """Tokens at rows [tiles down, r] and columns [tiles across, c] -> [tiles, r * c], -1 outside the image."""
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return (first + rows * width + columns).masked_fill(~inside, -1).flatten(2).flatten(0, 1)
