"""Blocks of queries against a range of keys, with a mask of their own: whatever the tokens are, and any radius.

Of an image, each block reads only the rows near enough; without a promise it reads every key. Masks are made for one
block at a time, so that memory grows linearly with the tokens. This is the fallback and what other forms must beat.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.kernels.neighbor.inputs import Inputs, added
from foveate.kernels.neighbor.reference import visible
from foveate.neighborhood import Block, Call, Grids


def attend(x: Inputs, call: Call, grids: Grids | None, blocks: tuple[Block, ...]) -> Tensor:
    """`foveate::neighbor_attention` block by block."""
    # Tokens behind the last image of their row are padding, which no block holds.
    out = x.q.new_zeros(call.batch, call.tokens, call.heads, call.size)
    for block in blocks:
        batch, queries = slice(*block.batch), slice(block.start, block.stop)
        some = scaled_dot_product_attention(
            x.q[batch, :, queries],
            _range(x.k, block),
            _range(x.v, block),
            attn_mask=_mask(x, call, block) if block.kind == "mask" else None,
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


def _mask(x: Inputs, call: Call, block: Block) -> Tensor:
    """What a block's queries see, to be added to scores: [B, 1, q, keys]."""
    batch, keys, text = slice(*block.batch), slice(*block.keys), slice(*block.text)
    order, coords = x.q_order[batch, block.start : block.stop], x.coords[batch, block.start : block.stop]
    seen = visible(
        order, coords, x.k_order[0][batch, keys], x.coords[batch, keys], call.radius, call.metric, call.causal
    )
    text_seen = x.k_order[1][batch, None, text] <= order[:, :, None]
    return added(torch.cat([seen, text_seen], 2), call.dtype)[:, None]
