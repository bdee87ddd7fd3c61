"""Forward kernel of neighbour attention as a plugin of TensorRT can launch it.

A plugin's kernel, compiled ahead of time, is given the pointers of its inputs, int32 scalars and the pointers of its
outputs, in this order, and nothing else: strides follow from the shapes, what a model fixes is a constant, and all
images have one grid, so that programs find their patch without a table.
"""

import triton
import triton.language as tl

from foveate.kernels.neighbor.triton_forward import attend_patch
from foveate.kernels.neighbor.triton_problem import Stream
from foveate.kernels.neighbor.triton_shared import image_of


@triton.jit
def head_major(x, heads, tokens, size):
    """The stream of x [B, heads, tokens, size], contiguous."""
    return Stream(x, heads * tokens * size, tokens * size, size)


@triton.jit(do_not_specialize=["tokens", "text_tokens"])
def plugin_forward(
    q,
    k,
    v,
    text_k,
    text_v,
    images,
    tokens,
    text_tokens,
    o,
    height: tl.constexpr,
    width: tl.constexpr,
    radius: tl.constexpr,
    scale: tl.constexpr,
    heads: tl.constexpr,
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
    """o [B, n, H, e] of every image token; grid (images * patches of an image, key heads); scale in units of log2.

    q [B, H, n, e], k, v [B, Hk, n, e], text_k, text_v [B, Hk, m, e], all contiguous; images as in
    `tables.image_table`; tokens: n, text_tokens: m. The last image of a batch row may lack its last tokens.
    """
    across = tl.cdiv(width, cols)
    patches = tl.cdiv(height, rows) * across
    program, key_head = tl.program_id(0), tl.program_id(1)
    batch, first, _, _, text_start, text_stop = image_of(images, program // patches)
    patch = program % patches
    attend_patch(
        head_major(q, heads, tokens, size),
        head_major(k, heads // group, tokens, size),
        head_major(v, heads // group, tokens, size),
        head_major(text_k, heads // group, text_tokens, size),
        head_major(text_v, heads // group, text_tokens, size),
        Stream(o, tokens * heads * size, size, heads * size),
        batch,
        first,
        height,
        width,
        text_start,
        text_stop,
        tokens,
        patch // across * rows,
        patch % across * cols,
        key_head,
        # A value, not a constant: `visible` casts it.
        tl.full([], radius, tl.int32),
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
        True,
    )
