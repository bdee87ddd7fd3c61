"""Tiles of queries whose keys are gathered by an index: every tile of every image in the batch, a chunk at a time.

Tables, made once for a set of grids, say which token stands at each place of each tile and which keys the tile sees;
a place outside its image points at token 0 and its result is thrown away. So images of any size run together, and the
op is a gather, a dense attention of small equal pieces with a mask, and a scatter. The query heads of one key head
stand below one another in a tile, so that its keys are read once for all of them.

In fp32 on a CPU the dense attention of a chunk is two batched products and a softmax: 1.4 times as fast as the fused
kernel, which multiplies such small pieces one by one. With other dtypes that would round the scores.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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


def attend(x: Inputs, call: Call, grids: Grids | None, tiles: Tiles) -> Tensor:
    """`foveate::neighbor_attention` where the grids hold."""
    assert grids is not None  # the plan chooses tiles for grids only
    tables = _tables(call, grids, tiles, x.q.device)
    queries, keys, values = _rows(x.q), _rows(*x.k), _rows(*x.v)
    out = (queries.new_empty if call.filled(grids) else queries.new_zeros)(len(queries) + call.heads, call.size)
    attended = _products if _plain(x) else _fused
    asked, answered = (_places(index, call, call.heads) for index in (tables.queries, tables.results))
    seen = _places(tables.keys, call, call.kv_heads)
    # Each thread has a cache of its own.
    step = tiles.step * torch.get_num_threads()
    for start in range(0, tiles.count, step):
        part = slice(start, start + step)
        mask = tables.masks.index_select(0, tables.kinds[part])
        some = attended(_gathered(queries, asked[:, part]), keys, values, seen[:, part], mask, x.scale)
        out.index_copy_(0, answered[:, part].flatten(), some.flatten(0, -2))
    return out[: -call.heads].view(call.batch, call.tokens, call.heads, call.size)


def _rows(visual: Tensor, text: Tensor | None = None) -> Tensor:
    """Streams [B, H, n, e] as rows [B * n * H, e], those of text behind all others."""
    rows = visual.transpose(1, 2).flatten(0, 2)
    return rows if text is None or not text.shape[2] else torch.cat([rows, _rows(text)])


def _places(index: Tensor, call: Call, heads: int) -> Tensor:
    """The rows of tokens [tiles, t] -> [Hk, tiles, heads of a group * t]."""
    head = torch.arange(heads, device=index.device).view(call.kv_heads, 1, -1, 1)
    return (heads * index[:, None] + head).flatten(2)


def _gathered(rows: Tensor, places: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows [tokens, e] at places [Hk, tiles, t] -> [Hk, tiles, t, e]."""
    return torch.index_select(rows, 0, places.flatten(), out=out).view(*places.shape, -1)


def _fused(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of q [Hk, tiles, group * q, e] on the rows seen [Hk, tiles, k], mask [tiles, group * q, k] added."""
    k, v = _gathered(keys, seen), _gathered(values, seen)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask[None], scale=scale)


def _products(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, mask: Tensor, scale: float) -> Tensor:
    """As `_fused`, without gradients."""
    heads, tiles, rows, size = q.shape
    # Values take the place of keys, once these have been multiplied.
    some = scratch("tile", (seen.numel(), size), q)
    pieces = some.view(heads * tiles, -1, size)
    scores = scratch("scores", (heads * tiles, rows, pieces.shape[1]), q)
    scores.view(heads, *mask.shape).copy_(mask)
    _gathered(keys, seen, some)
    torch.baddbmm(scores, q.flatten(0, 1), pieces.transpose(1, 2), alpha=scale, out=scores)
    torch.softmax(scores, -1, out=scores)
    _gathered(values, seen, some)
    return scores @ pieces


def _plain(x: Inputs) -> bool:
    """Whether products are the faster way: see above."""
    tensors = (x.q, *x.k, *x.v)
    differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    return x.q.dtype == torch.float32 and x.q.device.type == "cpu" and not differentiated


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
