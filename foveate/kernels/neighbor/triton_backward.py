"""Backward kernels of neighbour attention, without atomics: each gradient is written by the one program that owns it.

- `neighbor_dq`: a patch of queries over its halo of keys, like the forward kernel. It also makes `delta`, each row's
  sum of gradient times output, which the other two need.
- `neighbor_dkv`: a patch of keys over the reversed halo, the queries that see it.
- `text_dkv`: a block of text keys over a run of an image's queries. All queries of an image see its text keys, so
  they are cut into runs for many programs; what these make is summed afterwards.

Matrix rows of a block of queries are (token, head of the group), without gaps.
"""

import triton
import triton.language as tl

from foveate.kernels.neighbor.triton_shared import (
    address,
    halo,
    halo_place,
    image_of,
    load_rows,
    packed_patch,
    store_rows,
    visible,
)

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def grow_dq(q, d_out, keys, values, seen, lse, delta, dq, scale, precision: tl.constexpr):
    """dq with one block of keys added, short of the scale."""
    scores = tl.dot(q, tl.trans(keys), input_precision=precision) * scale
    weights = tl.where(seen, tl.exp2((scores - lse[:, None]) * LOG2_E), 0.0)
    d_weights = tl.dot(d_out, tl.trans(values), input_precision=precision)
    d_scores = weights * (d_weights - delta[:, None])
    return tl.dot(d_scores.to(keys.dtype), keys, dq, input_precision=precision)


@triton.jit
def grow_dkv(
    q, d_out, lse, delta, batch, head, query, valid, keys, values, seen, dk, dv, scale,
    size: tl.constexpr, padded: tl.constexpr, precision: tl.constexpr,
):  # fmt: skip
    """dk and dv with one block of queries added, dk short of the scale; seen broadcasts to [keys, queries]."""
    queries = load_rows(q, batch, head, query, valid, size, padded)
    gradient = load_rows(d_out, batch, head, query, valid, size, padded)
    total = tl.load(address(lse, batch, head, query), mask=valid, other=0.0)
    mean = tl.load(address(delta, batch, head, query), mask=valid, other=0.0)
    scores = tl.dot(keys, tl.trans(queries), input_precision=precision) * scale
    weights = tl.where(seen, tl.exp2((scores - total[None, :]) * LOG2_E), 0.0)
    dv = tl.dot(weights.to(gradient.dtype), gradient, dv, input_precision=precision)
    d_weights = tl.dot(values, tl.trans(gradient), input_precision=precision)
    d_scores = weights * (d_weights - mean[None, :])
    return tl.dot(d_scores.to(queries.dtype), queries, dk, input_precision=precision), dv


@triton.jit(do_not_specialize=["radius"])
def neighbor_dq(
    q,
    k,
    v,
    text_k,
    text_v,
    o,
    d_out,
    dq,
    lse,
    delta,
    images,
    tiles,
    radius,
    scale,
    group: tl.constexpr,
    packed: tl.constexpr,
    size: tl.constexpr,
    padded: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
    block: tl.constexpr,
    text: tl.constexpr,
    euclidean: tl.constexpr,
    causal: tl.constexpr,
    precision: tl.constexpr,
):
    """dq and delta of every image token; grid (tiles, key heads)."""
    tile, key_head = tiles + tl.program_id(0) * 4, tl.program_id(1)
    batch, first, height, width, text_start, text_stop = image_of(images, tl.load(tile))
    top, left = tl.load(tile + 1), tl.load(tile + 2)
    corner = first + top * width + left
    head, row, col, valid = packed_patch(height - top, width - left, key_head, group, packed, rows, cols)
    query = corner + row * width + col
    gradient = load_rows(d_out, batch, head, query, valid, size, padded)
    mean = tl.sum(gradient.to(tl.float32) * load_rows(o, batch, head, query, valid, size, padded).to(tl.float32), 1)
    tl.store(address(delta, batch, head, query), mean, mask=valid)
    queries = load_rows(q, batch, head, query, valid, size, padded)
    total = tl.load(address(lse, batch, head, query), mask=valid, other=0.0)
    grown = tl.zeros([packed * rows * cols, padded], tl.float32)

    below = 0 if causal else radius
    first_row, first_col, wide, count = halo(top, left, height, width, radius, below, radius, rows, cols)
    for start in range(0, count, block):
        slot = start + tl.arange(0, block)
        key_row, key_col = halo_place(slot, first_row, first_col, wide, count)
        key = corner + key_row * width + key_col
        keys = load_rows(k, batch, key_head, key, slot < count, size, padded)
        values = load_rows(v, batch, key_head, key, slot < count, size, padded)
        seen = visible(row[:, None], col[:, None], key_row[None, :], key_col[None, :], width, radius, euclidean, causal)
        grown = grow_dq(queries, gradient, keys, values, seen, total, mean, grown, scale, precision)

    if text:
        for start in range(text_start, text_stop, block):
            key = start + tl.arange(0, block)
            keys = load_rows(text_k, batch, key_head, key, key < text_stop, size, padded)
            values = load_rows(text_v, batch, key_head, key, key < text_stop, size, padded)
            seen = (key < text_stop)[None, :]
            grown = grow_dq(queries, gradient, keys, values, seen, total, mean, grown, scale, precision)

    store_rows(dq, batch, head, query, grown * scale, valid, size, padded)


@triton.jit(do_not_specialize=["radius"])
def neighbor_dkv(
    q,
    k,
    v,
    d_out,
    dk,
    dv,
    lse,
    delta,
    images,
    tiles,
    radius,
    scale,
    group: tl.constexpr,
    size: tl.constexpr,
    padded: tl.constexpr,
    rows: tl.constexpr,
    cols: tl.constexpr,
    block: tl.constexpr,
    euclidean: tl.constexpr,
    causal: tl.constexpr,
    precision: tl.constexpr,
):
    """dk and dv of every image token; grid (tiles, key heads)."""
    tile, key_head = tiles + tl.program_id(0) * 4, tl.program_id(1)
    batch, first, height, width, _, _ = image_of(images, tl.load(tile))
    top, left = tl.load(tile + 1), tl.load(tile + 2)
    corner = first + top * width + left
    _, row, col, valid = packed_patch(height - top, width - left, key_head, 1, 1, rows, cols)
    key = corner + row * width + col
    keys = load_rows(k, batch, key_head, key, valid, size, padded)
    values = load_rows(v, batch, key_head, key, valid, size, padded)
    grown_k = tl.zeros([rows * cols, padded], tl.float32)
    grown_v = tl.zeros([rows * cols, padded], tl.float32)

    above = 0 if causal else radius
    first_row, first_col, wide, count = halo(top, left, height, width, above, radius, radius, rows, cols)
    for start in range(0, count * group, block):
        packed_slot = start + tl.arange(0, block)
        slot = packed_slot // group
        query_row, query_col = halo_place(slot, first_row, first_col, wide, count)
        query = corner + query_row * width + query_col
        head = key_head * group + packed_slot % group
        seen = visible(
            query_row[None, :], query_col[None, :], row[:, None], col[:, None], width, radius, euclidean, causal
        )
        grown_k, grown_v = grow_dkv(
            q, d_out, lse, delta, batch, head, query, slot < count, keys, values, seen, grown_k, grown_v, scale,
            size, padded, precision,
        )  # fmt: skip

    store_rows(dk, batch, key_head, key, grown_k * scale, valid, size, padded)
    store_rows(dv, batch, key_head, key, grown_v, valid, size, padded)


@triton.jit
def text_dkv(
    q,
    text_k,
    text_v,
    d_out,
    part_k,
    part_v,
    lse,
    delta,
    images,
    runs,
    scale,
    group: tl.constexpr,
    size: tl.constexpr,
    padded: tl.constexpr,
    keys_block: tl.constexpr,
    block: tl.constexpr,
    precision: tl.constexpr,
):
    """A run's share of the text's dk and dv, fp32 [runs, Hk, text, e]; grid (runs, blocks of text keys, key heads)."""
    run, key_head = runs + tl.program_id(0) * 4, tl.program_id(2)
    batch, first, _, _, text_start, text_stop = image_of(images, tl.load(run))
    begin, count = first + tl.load(run + 1), tl.load(run + 2)
    key = tl.program_id(1) * keys_block + tl.arange(0, keys_block)
    valid = (key >= text_start) & (key < text_stop)
    keys = load_rows(text_k, batch, key_head, key, valid, size, padded)
    values = load_rows(text_v, batch, key_head, key, valid, size, padded)
    grown_k = tl.zeros([keys_block, padded], tl.float32)
    grown_v = tl.zeros([keys_block, padded], tl.float32)

    # A block that the image does not see adds nothing, but its share is written all the same: all shares are summed.
    for start in range(0, tl.max(valid.to(tl.int32)) * count * group, block):
        packed_slot = start + tl.arange(0, block)
        slot = packed_slot // group
        head = key_head * group + packed_slot % group
        seen = valid[:, None] & (slot < count)[None, :]
        grown_k, grown_v = grow_dkv(
            q, d_out, lse, delta, batch, head, begin + slot, slot < count, keys, values, seen, grown_k, grown_v, scale,
            size, padded, precision,
        )  # fmt: skip

    share = tl.program_id(0).to(tl.int64)
    store_rows(part_k, share, key_head, key, grown_k * scale, key >= 0, size, padded)
    store_rows(part_v, share, key_head, key, grown_v, key >= 0, size, padded)
