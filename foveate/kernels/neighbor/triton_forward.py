"""Forward kernel of neighbour attention: one program owns a patch of queries and reads exactly its halo of keys.

The query heads of one key head share the program: its matrix rows are (head of the group, token of the patch).
The softmax is the online one.
"""

import triton
import triton.language as tl

from foveate.kernels.neighbor.triton_shared import (
    UNSEEN,
    address,
    halo,
    halo_place,
    image_of,
    load_rows,
    packed_patch,
    store_rows,
    visible,
)


@triton.jit
def attend(q, keys, values, seen, out, peak, total, scale, precision: tl.constexpr):
    """One block of keys: the output, the largest score and the sum of each row so far; scores in units of log2."""
    scores = tl.dot(q, tl.trans(keys), input_precision=precision)
    scores = tl.where(seen, scores * scale, UNSEEN)
    higher = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    decay = tl.exp2(peak - higher)
    out = tl.dot(weights.to(values.dtype), values, out * decay[:, None], input_precision=precision)
    return out, higher, total * decay + tl.sum(weights, 1)


@triton.jit
def attend_patch(
    q,
    k,
    v,
    text_k,
    text_v,
    o,
    batch,
    first,
    height,
    width,
    text_start,
    text_stop,
    tokens,
    top,
    left,
    key_head,
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
    bounded: tl.constexpr,
):
    """o of the patch at row `top` and column `left` of an image; scale in units of log2.

    tokens: of a batch row; with `bounded`, its last image may lack its last ones. Returns head and token of each row,
    whether it is one, its largest score and its sum.
    """
    corner = first + top * width + left
    head, row, col, valid = packed_patch(height - top, width - left, key_head, group, packed, rows, cols)
    query = corner + row * width + col
    if bounded:
        valid = valid & (query < tokens)
    queries = load_rows(q, batch, head, query, valid, size, padded)

    peak = tl.full([packed * rows * cols], UNSEEN, tl.float32)
    total = tl.zeros([packed * rows * cols], tl.float32)
    out = tl.zeros([packed * rows * cols, padded], tl.float32)

    below = 0 if causal else radius
    first_row, first_col, wide, count = halo(top, left, height, width, radius, below, radius, rows, cols)
    for start in range(0, count, block):
        slot = start + tl.arange(0, block)
        key_row, key_col = halo_place(slot, first_row, first_col, wide, count)
        key = corner + key_row * width + key_col
        there = slot < count
        if bounded:
            there = there & (key < tokens)
        keys = load_rows(k, batch, key_head, key, there, size, padded)
        values = load_rows(v, batch, key_head, key, there, size, padded)
        seen = visible(row[:, None], col[:, None], key_row[None, :], key_col[None, :], width, radius, euclidean, causal)
        if bounded:
            seen = seen & there[None, :]
        out, peak, total = attend(queries, keys, values, seen, out, peak, total, scale, precision)

    if text:
        for start in range(text_start, text_stop, block):
            key = start + tl.arange(0, block)
            keys = load_rows(text_k, batch, key_head, key, key < text_stop, size, padded)
            values = load_rows(text_v, batch, key_head, key, key < text_stop, size, padded)
            seen = (key < text_stop)[None, :]
            out, peak, total = attend(queries, keys, values, seen, out, peak, total, scale, precision)

    store_rows(o, batch, head, query, out / total[:, None], valid, size, padded)
    return head, query, valid, peak, total


@triton.jit(do_not_specialize=["radius"])
def neighbor_forward(
    q,
    k,
    v,
    text_k,
    text_v,
    o,
    lse,
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
    """o and lse of every image token; grid (tiles, key heads); scale in units of log2."""
    tile, key_head = tiles + tl.program_id(0) * 4, tl.program_id(1)
    batch, first, height, width, text_start, text_stop = image_of(images, tl.load(tile))
    top, left = tl.load(tile + 1), tl.load(tile + 2)
    head, query, valid, peak, total = attend_patch(
        q,
        k,
        v,
        text_k,
        text_v,
        o,
        batch,
        first,
        height,
        width,
        text_start,
        text_stop,
        0,
        top,
        left,
        key_head,
        radius,
        scale,
        group,
        packed,
        size,
        padded,
        rows,
        cols,
        block,
        text,
        euclidean,
        causal,
        precision,
        False,
    )
    # exp2 and log2 inside, the natural logarithm outside.
    logarithm = (peak + tl.log2(total)) * 0.6931471805599453
    tl.store(address(lse, batch, head, query), logarithm, mask=valid)
