"""Forward kernel of neighbour attention: one program owns a patch of queries and reads exactly its halo of keys.

The query heads of one key head share the program: its matrix rows are (head of the group, token of the patch).
Streams are `triton_launch.Stream` tuples. The softmax is the online one, in units of log2.
"""

import triton
import triton.language as tl

from foveate.kernels.neighbor.triton_shared import UNSEEN, halo, halo_place, head_of, load_tokens, visible


@triton.jit
def attend(q, keys, values, seen, out, peak, total, scale, precision: tl.constexpr):
    """One block of keys: the output, the largest score and the sum of each row so far."""
    scores = tl.dot(q, tl.trans(keys), input_precision=precision)
    scores = tl.where(seen, scores * scale, UNSEEN)
    higher = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.exp2(scores - higher[:, None])
    decay = tl.exp2(peak - higher)
    out = tl.dot(weights.to(values.dtype), values, out * decay[:, None], input_precision=precision)
    return out, higher, total * decay + tl.sum(weights, 1)


@triton.jit(do_not_specialize=["radius", "tokens"])
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
    tokens,
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
    """o and lse [B, H, tokens] of every image token; grid (tiles, key heads); scale in units of log2."""
    tile = tiles + tl.program_id(0) * 4
    image = images + tl.load(tile) * 8
    top, left = tl.load(tile + 1), tl.load(tile + 2)
    batch = tl.load(image).to(tl.int64)
    first, height, width = tl.load(image + 1), tl.load(image + 2), tl.load(image + 3)
    key_head = tl.program_id(1).to(tl.int64)
    corner = first + top * width + left

    row = tl.arange(0, packed * rows * cols)
    member = row // (rows * cols)
    query_row, query_col = row % (rows * cols) // cols, row % cols
    valid = (member < group) & (query_row < height - top) & (query_col < width - left)
    query = corner + query_row * width + query_col
    head = key_head * group + member
    element = tl.arange(0, padded)
    inside = valid[:, None] & (element < size)[None, :]
    queries = tl.load(
        q.base + batch * q.batch + (head * q.head + query * q.token)[:, None] + element[None, :], mask=inside, other=0.0
    )

    peak = tl.full([packed * rows * cols], UNSEEN, tl.float32)
    total = tl.zeros([packed * rows * cols], tl.float32)
    out = tl.zeros([packed * rows * cols, padded], tl.float32)

    first_row, first_col, wide, count = halo(
        top, left, height, width, radius, 0 if causal else radius, radius, rows, cols
    )
    k_head, v_head = head_of(k, batch, key_head), head_of(v, batch, key_head)
    for start in range(0, count, block):
        slot = start + tl.arange(0, block)
        key_row, key_col = halo_place(slot, first_row, first_col, wide, count)
        key = corner + key_row * width + key_col
        keys = load_tokens(k_head, k.token, key, slot < count, size, padded)
        values = load_tokens(v_head, v.token, key, slot < count, size, padded)
        seen = visible(
            query_row[:, None], query_col[:, None], key_row[None, :], key_col[None, :], width, radius, euclidean, causal
        )
        out, peak, total = attend(queries, keys, values, seen, out, peak, total, scale, precision)

    if text:
        text_start, text_stop = tl.load(image + 4), tl.load(image + 5)
        k_head, v_head = head_of(text_k, batch, key_head), head_of(text_v, batch, key_head)
        for start in range(text_start, text_stop, block):
            key = start + tl.arange(0, block)
            keys = load_tokens(k_head, text_k.token, key, key < text_stop, size, padded)
            values = load_tokens(v_head, text_v.token, key, key < text_stop, size, padded)
            out, peak, total = attend(
                queries, keys, values, (key < text_stop)[None, :], out, peak, total, scale, precision
            )

    out = out / total[:, None]
    target = o.base + batch * o.batch + (head * o.head + query * o.token)[:, None] + element[None, :]
    tl.store(target, out.to(o.base.dtype.element_ty), mask=inside)
    heads = tl.num_programs(1) * group
    # exp2 and log2 inside, the natural logarithm outside.
    tl.store(lse + (batch * heads + head) * tokens + query, (peak + tl.log2(total)) * 0.6931471805599453, mask=valid)
