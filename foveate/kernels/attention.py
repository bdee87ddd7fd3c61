"""Causal attention over visual and text streams, without an S x S mask.

Three ways, all exact, chosen by what the caller promised (see `foveate.ops.attention`):

- *few queries* (decoding, one row): one matmul a key stream; only the scores are concatenated, never the cache.
- *structure known* (`prefix` >= 0): the streams are put in sequence order and the causal kernel does the rest.
- *nothing known* (padding, several images): blocks of queries, each with a boolean mask of its own.

Masks cover one block of queries, so memory grows linearly with the number of tokens.
"""

import itertools
import math

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.errors import InputError
from foveate.ops import BLOCK, FEW_QUERIES


def attention(
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    q_order: list[Tensor],
    k_order: list[Tensor],
    prefix: int,
    layout: str,
    scale: float,
    reach: list[Tensor] | None = None,
    window: int = 0,
) -> Tensor:
    """`foveate::attention`; shapes as in `foveate.ops`."""
    last = q_order if reach is None else reach
    if sum(x.shape[2] for x in q) <= FEW_QUERIES:
        order, visible = torch.cat(q_order, 1), None
        if reach is not None or window:
            visible = sees(order, torch.cat(last, 1), torch.cat(k_order, 1), window)
        rows = softmaxed_rows(torch.cat(q, 2), k, order, k_order, scale, visible).to(q[0].dtype)
        parts = rows.split([x.shape[2] for x in k], dim=3)
        out = sum(grouped(p, x) for p, x in zip(parts, v, strict=True))
        assert isinstance(out, Tensor)  # k and v are never empty lists
        return out.transpose(1, 2).contiguous()
    if prefix >= 0 and layout in _STRUCTURED and reach is None and not window:
        return _STRUCTURED[layout](q, k, v, prefix, scale)
    keys, values, key_order = torch.cat(k, 2), torch.cat(v, 2), torch.cat(k_order, 1)
    streams = zip(q, q_order, last, strict=True)
    outs = [_masked(x, keys, values, order, upto, key_order, scale, window) for x, order, upto in streams]
    return torch.cat(outs, 2).transpose(1, 2).contiguous()


def sees(q_order: Tensor, last: Tensor, k_order: Tensor, window: int = 0) -> Tensor:
    """Which keys a query sees, those up to the order `last` and within the window: bool [B, n, m]."""
    visible = k_order[:, None, :] <= last[:, :, None]
    # Not `k_order + window`, which padding would overflow.
    return visible & (k_order[:, None, :] > q_order[:, :, None] - window) if window else visible


def encoder_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """`foveate::encoder_attention`; shapes as in `foveate.ops`."""
    # A mask that wants a gradient would take torch's way by a matrix of all pairs.
    mask = None if bias is None else bias.detach()[:, None, None, :].to(q.dtype)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2).contiguous()


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float) -> Tensor:
    """`foveate::varlen_attention`; one call a segment, so that no score between two segments is computed."""
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != q.shape[2] or sorted(bounds) != bounds:
        raise InputError(f"cu_seqlens must rise from 0 to the {q.shape[2]} tokens of the sequence, it is {bounds}")
    for start, stop in itertools.pairwise(bounds):
        part = slice(start, stop)
        out[:, part] = encoder_attention(q[:, :, part], k[:, :, part], v[:, :, part], scale)
    return out


def attention_row(q: Tensor, k: list[Tensor], q_order: Tensor, k_order: list[Tensor], scale: float) -> Tensor:
    """`foveate::attention_row`; shapes as in `foveate.ops`."""
    # Ops return what their fakes promise: contiguous values.
    return softmaxed_rows(q, k, q_order, k_order, scale)[..., : k[0].shape[2]].contiguous()


def softmaxed_rows(
    q: Tensor, k: list[Tensor], q_order: Tensor, k_order: list[Tensor], scale: float, visible: Tensor | None = None
) -> Tensor:
    """Softmaxed rows fp32 [B, H, R, all keys]; one matmul a key stream, only scores are concatenated.

    visible: which keys a query sees, bool [B, R, all keys], where orders do not say it.
    """
    batch, heads, rows, size = q.shape
    # Sizes are written out: with no query at all, -1 would be ambiguous.
    kv_heads = k[0].shape[1]
    groups = q.reshape(batch, kv_heads, heads // kv_heads * rows, size)
    scores = torch.cat([(groups @ x.transpose(2, 3)).float() for x in k], dim=3) * scale
    scores = scores.view(batch, heads, rows, scores.shape[3])
    if visible is None:
        visible = torch.cat(k_order, 1)[:, None, :] <= q_order[:, :, None]
    return scores.masked_fill(~visible[:, None], -math.inf).softmax(-1)


def grouped(rows: Tensor, v: Tensor) -> Tensor:
    """Rows [B, H, R, m] times v [B, Hk, m, e] with each key head shared by its group -> [B, H, R, e]."""
    batch, heads, count, keys = rows.shape
    groups = rows.reshape(batch, v.shape[1], heads // v.shape[1] * count, keys)
    return (groups @ v).view(batch, heads, count, v.shape[3])


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)


def _masked(
    q: Tensor, k: Tensor, v: Tensor, q_order: Tensor, last: Tensor, k_order: Tensor, scale: float, window: int
) -> Tensor:
    """Queries in blocks, each with its own mask from the orders -> [B, H, n, e]."""
    blocks = zip(q.split(BLOCK, 2), q_order.split(BLOCK, 1), last.split(BLOCK, 1), strict=True)
    outs = [_sdpa(rows, k, v, scale, sees(order, upto, k_order, window)[:, None]) for rows, order, upto in blocks]
    return torch.cat(outs, 2)


def _lower_right(q: Tensor, k: Tensor, v: Tensor, scale: float, early: int = 0, place: int = 0) -> Tensor:
    """Causal attention of the last n of m positions: q [B, H, n, e], k, v [B, Hk, m, e], n <= m.

    early: so many of the queries, the first ones, stand elsewhere, from `place` on.
    """
    n, m = q.shape[2], k.shape[2]
    if n == m:
        return _sdpa(q, k, v, scale, causal=True)
    positions = torch.arange(m, device=q.device)
    places = torch.cat([positions[place : place + early], positions[m - n + early :]])
    outs = []
    for start in range(0, n, BLOCK):
        stop = min(start + BLOCK, n)
        seen = m - n + stop
        mask = positions[:seen] <= places[start:stop, None]
        outs.append(_sdpa(q[:, :, start:stop], k[:, :, :seen], v[:, :, :seen], scale, mask))
    return torch.cat(outs, 2) if outs else torch.empty_like(q)


def in_sequence(streams: list[Tensor], prefix: int) -> Tensor:
    """Visual and text stream [B, H, n, ...] in the order of the prompt."""
    visual, text = streams
    return torch.cat([text[:, :, :prefix], visual, text[:, :, prefix:]], 2)


def _whole(q: list[Tensor], k: list[Tensor], v: list[Tensor], prefix: int, scale: float) -> Tensor:
    """vt:vt, a whole layer: one causal call in sequence order."""
    queries, keys, values = (in_sequence(x, prefix) for x in (q, k, v))
    out = _sdpa(queries, keys, values, scale, causal=True).transpose(1, 2)
    end = prefix + q[0].shape[2]
    return torch.cat([out[:, prefix:end], out[:, :prefix], out[:, end:]], 1)


def _blind(q: list[Tensor], k: list[Tensor], v: list[Tensor], prefix: int, scale: float) -> Tensor:
    """t:t, text that does not see the image."""
    return _lower_right(q[0], k[0], v[0], scale).transpose(1, 2).contiguous()


def _visual(q: list[Tensor], k: list[Tensor], v: list[Tensor], prefix: int, scale: float) -> Tensor:
    """v:vt, visual queries see the text before the image and, causally, the image."""
    keys, values = (torch.cat([x[1][:, :, :prefix], x[0]], 2) for x in (k, v))
    return _lower_right(q[0], keys, values, scale).transpose(1, 2).contiguous()


def _text(q: list[Tensor], k: list[Tensor], v: list[Tensor], prefix: int, scale: float) -> Tensor:
    """t:vt, text queries: those before the image see only text, those after it see the whole prompt.

    Fewer queries than text keys are the last ones of the prompt.
    """
    before = max(0, prefix - (k[1].shape[2] - q[0].shape[2]))
    keys, values = (in_sequence(x, prefix) for x in (k, v))
    if before <= FEW_QUERIES:
        # Not worth a call of their own.
        out = _lower_right(q[0], keys, values, scale, before, prefix - before)
    else:
        first = _lower_right(q[0][:, :, :before], k[1][:, :, :prefix], v[1][:, :, :prefix], scale)
        out = torch.cat([first, _lower_right(q[0][:, :, before:], keys, values, scale)], 2)
    return out.transpose(1, 2).contiguous()


_STRUCTURED = {"vt:vt": _whole, "t:t": _blind, "v:vt": _visual, "t:vt": _text}
