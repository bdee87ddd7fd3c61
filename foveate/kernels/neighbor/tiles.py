"""Tiles of queries whose keys are gathered by an index: every tile of every image in the batch, a chunk at a time.

Tables, made once for a set of grids, say which token stands at each place of each tile and which keys the tile sees;
a place outside its image points at token 0 and its result is thrown away. So images of any size run together, and the
op is a gather, a dense attention of small equal pieces with a mask, and a scatter. The query heads of one key head
stand below one another in a tile, so that its keys are read once for all of them.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.kernels.neighbor.inputs import Inputs, added, near
from foveate.neighborhood import Call, Grid, Grids, Tiles


@dataclass(frozen=True)
class Tables:
    """Where the tokens of each tile are, and what they see.

    queries [tiles, q] and keys [tiles, k] point at the tokens of the whole batch, text keys behind all visual ones;
    results [tiles, q] are the rows where the results go, one behind the last for those that mean nothing;
    mask [tiles, 1, group * q, k] is added to scores.
    """

    queries: Tensor
    keys: Tensor
    results: Tensor
    mask: Tensor


def attend(x: Inputs, call: Call, grids: Grids | None, tiles: Tiles) -> Tensor:
    """`foveate::neighbor_attention` where the grids hold."""
    assert grids is not None  # the plan chooses tiles for grids only
    tables = _tables(call, grids, tiles, x.q.device)
    queries, keys, values = _rows(x.q), _rows(*x.k), _rows(*x.v)
    # Not every token is in a tile: those behind the last image of their batch row are padding.
    covered = sum(grid.tokens for grid in grids) == len(queries)
    out = (queries.new_empty if covered else queries.new_zeros)(len(queries) + 1, queries.shape[1])
    for start in range(0, tiles.count, tiles.step):
        part = slice(start, start + tiles.step)
        some = scaled_dot_product_attention(
            _gathered(queries, tables.queries[part], call),
            _gathered(keys, tables.keys[part], call),
            _gathered(values, tables.keys[part], call),
            attn_mask=tables.mask[part],
            scale=x.scale,
        )
        # [tiles, Hk, group * q, e] -> [tiles * q, Hk * group * e]
        rows = some.unflatten(2, (-1, tiles.queries)).permute(0, 3, 1, 2, 4).reshape(-1, out.shape[1])
        out.index_copy_(0, tables.results[part].flatten(), rows)
    return out[:-1].view(call.batch, call.tokens, call.heads, call.size)


def _rows(visual: Tensor, text: Tensor | None = None) -> Tensor:
    """Streams [B, H, n, e] as rows [B * n, H * e], those of text behind all others."""
    rows = visual.transpose(1, 2).flatten(0, 1).flatten(1)
    return rows if text is None or not text.shape[2] else torch.cat([rows, _rows(text)])


def _gathered(rows: Tensor, index: Tensor, call: Call) -> Tensor:
    """Rows at index [tiles, t] -> [tiles, Hk, heads of a group * t, e]."""
    some = rows.index_select(0, index.flatten())
    return some.view(*index.shape, call.kv_heads, -1, call.size).permute(0, 2, 3, 1, 4).flatten(2, 3)


@lru_cache(maxsize=32)
def _tables(call: Call, grids: Grids, tiles: Tiles, device: torch.device) -> Tables:
    """The tables of a set of grids; layers with the same options share them."""
    parts = [_image(call, grid, tiles) for grid in grids]
    queries, keys, seen = (torch.cat(part).to(device) for part in zip(*parts, strict=True))
    results = queries.masked_fill(queries < 0, call.batch * call.tokens)
    mask = added(seen, call.dtype).repeat(1, call.heads // call.kv_heads, 1)[:, None]
    return Tables(queries.clamp(min=0), keys.clamp(min=0), results, mask)


def _image(call: Call, grid: Grid, tiles: Tiles) -> tuple[Tensor, Tensor, Tensor]:
    """The tiles of one image: queries [tiles, q] and keys [tiles, k], -1 where no token is, and which are seen."""
    height, width = call.laid(grid)
    top, left = torch.arange(0, height, tiles.rows)[:, None], torch.arange(0, width, tiles.columns)[:, None]
    row, column = top + torch.arange(tiles.rows), left + torch.arange(tiles.columns)
    key_row, key_column = (top - tiles.above + torch.arange(tiles.span), left - tiles.aside + torch.arange(tiles.reach))
    first = grid.row * call.tokens + grid.start
    queries = _crossed(row, column, height, width, first)
    keys = _crossed(key_row, key_column, height, width, first)
    # All tiles are alike but for what is outside: [rows, columns, rows of keys, columns of keys].
    down = row[0, :, None, None, None] - key_row[0, :, None]
    right = column[0, :, None, None] - key_column[0]
    seen = near(down, right, call).flatten(2).flatten(0, 1) & (keys >= 0)[:, None]
    place = torch.arange(tiles.text)
    text = call.batch * call.tokens + grid.row * call.text + grid.text_start + place
    text = torch.where(place < grid.text, text, -1).expand(len(keys), -1)
    seen_text = (text >= 0)[:, None].expand(-1, seen.shape[1], -1)
    return queries, torch.cat([keys, text], 1), torch.cat([seen, seen_text], 2)


def _crossed(rows: Tensor, columns: Tensor, height: int, width: int, first: int) -> Tensor:
    """Tokens at rows [tiles down, r] and columns [tiles across, c] -> [tiles, r * c], -1 outside the image."""
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    return (first + rows * width + columns).masked_fill(~inside, -1).flatten(2).flatten(0, 1)
