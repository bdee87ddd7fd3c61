"""Blocks of queries against a range of keys, with a mask of their own: whatever the tokens are, and any radius.

Of an image, each block reads only the rows near enough; without a promise it reads every key. Masks are made for one
block at a time, so that memory grows linearly with the tokens. This is the fallback and what other forms must beat.
"""

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from foveate.kernels.neighbor.inputs import Inputs, added, near
from foveate.kernels.neighbor.reference import visible
from foveate.neighborhood import Block, Call, Grids


def attend(x: Inputs, call: Call, grids: Grids | None, blocks: tuple[Block, ...]) -> Tensor:
    """`foveate::neighbor_attention` block by block."""
    out = (x.q.new_empty if call.filled(grids) else x.q.new_zeros)(call.batch, call.tokens, call.heads, call.size)
    for block in blocks:
        batch, queries = slice(*block.batch), slice(block.start, block.stop)
        some = scaled_dot_product_attention(
            x.q[batch, :, queries],
            _range(x.k, block),
            _range(x.v, block),
            attn_mask=_MASKS[block.kind](x, call, block) if block.kind in _MASKS else None,
            is_causal=block.kind == "causal",
            scale=x.scale,
            enable_gqa=call.heads != call.kv_heads,
        )
        out[batch, queries] = some.transpose(1, 2)
    return out


def _range(streams: tuple[Tensor, Tensor], block: Block) -> Tensor:
    """The keys, or values, of a block: visual [B, Hk, k, e], its text behind them."""
    batch, keys, text = slice(*block.batch), slice(*block.keys), slice(*block.text)
    visual = streams[0][batch, :, keys]
    return visual if text.start == text.stop else torch.cat([visual, streams[1][batch, :, text]], 2)


def _of_orders(x: Inputs, call: Call, block: Block) -> Tensor:
    """What a block's queries see of any tokens, to be added to scores: [B, 1, q, keys]."""
    batch, keys, text = slice(*block.batch), slice(*block.keys), slice(*block.text)
    order, coords = x.q_order[batch, block.start : block.stop], x.coords[batch, block.start : block.stop]
    seen = visible(
        order, coords, x.k_order[0][batch, keys], x.coords[batch, keys], call.radius, call.metric, call.causal
    )
    text_seen = x.k_order[1][batch, None, text] <= order[:, :, None]
    return added(torch.cat([seen, text_seen], 2), call.dtype)[:, None]


def _of_grid(x: Inputs, call: Call, block: Block) -> Tensor:
    """What whole rows of queries see of whole rows of keys, the same: [q, keys]."""
    columns, (key, last), text = block.columns, block.keys, block.text[1] - block.text[0]
    rows, key_rows, offset = (
        (a - b) // columns for a, b in ((block.stop, block.start), (last, key), (block.start, key))
    )
    table = _table(call, columns, block.far, x.q.device)
    mask = torch.stack([table[:, block.far - offset - row :][:, :key_rows] for row in range(rows)])
    return pad(mask.flatten(2).flatten(0, 1), (0, text))


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _table(call: Call, columns: int, far: int, device: torch.device) -> Tensor:
    """What the queries of one row see of rows of keys from `far` rows above to as many below: [columns, rows, columns].

    All that counts is how many rows lie between, so a block's mask is put together from ranges of it.
    """
    column = torch.arange(columns, device=device)
    down = torch.arange(far, -far - 1, -1, device=device)
    return added(near(down[:, None], column[:, None, None] - column, call), call.dtype)


_MASKS = {"mask": _of_orders, "grid": _of_grid}
