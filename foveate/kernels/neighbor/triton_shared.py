"""What the forward and the backward kernels share: halos, masks and softmax steps of 2-D patches.

A *patch* is a rectangle of tokens of one image, its *halo* the tokens that it may see (or that may see it), clipped
to the image. Rows and columns inside a program are counted from the patch's first token, so they are small.
"""

import triton
import triton.language as tl

FAR = tl.constexpr(1 << 14)
"""Row of a halo slot that holds no token: farther than any radius, and its square still fits in 32 bits."""

UNSEEN = tl.constexpr(-1.0e30)
"""Score of a pair that is masked: finite, since the difference of two infinities is not a number."""


@triton.jit
def head_of(x, batch, head):
    """Address of a stream's token 0 in one batch row and head."""
    return x.base + batch * x.batch + head * x.head


@triton.jit
def load_tokens(base, stride, tokens, valid, size: tl.constexpr, padded: tl.constexpr):
    """[tokens, padded] elements of one head; zero where a token is not valid, and behind the head's size."""
    element = tl.arange(0, padded)
    return tl.load(
        base + tokens[:, None] * stride + element[None, :],
        mask=valid[:, None] & (element < size)[None, :],
        other=0.0,
    )


@triton.jit
def halo(top, left, height, width, above, below, sideways, rows: tl.constexpr, cols: tl.constexpr):
    """First row and column of a clipped halo (counted from the patch), its width, and its number of tokens."""
    first_row = tl.maximum(top - above, 0)
    first_col = tl.maximum(left - sideways, 0)
    high = tl.minimum(top + rows + below, height) - first_row
    wide = tl.minimum(left + cols + sideways, width) - first_col
    return first_row - top, first_col - left, wide, high * wide


@triton.jit
def halo_place(slot, first_row, first_col, wide, count):
    """Row and column of each halo slot, slots counted in raster order."""
    # A float product instead of an integer division; with the half added it is exact up to 2**21 slots.
    row = ((slot.to(tl.float32) + 0.5) * (1.0 / wide)).to(tl.int32)
    col = slot - row * wide
    return tl.where(slot < count, row + first_row, FAR), col + first_col


@triton.jit
def visible(query_row, query_col, key_row, key_col, width, radius, euclidean: tl.constexpr, causal: tl.constexpr):
    """Whether each query sees each key, of arguments that broadcast against each other."""
    rows = query_row - key_row
    cols = query_col - key_col
    if euclidean:
        seen = rows * rows + cols * cols <= radius * radius
    else:
        # One unsigned comparison for -radius <= x <= radius.
        reach = (2 * radius).to(tl.uint32)
        seen = ((rows + radius).to(tl.uint32) <= reach) & ((cols + radius).to(tl.uint32) <= reach)
    if causal:
        seen = seen & (rows * width + cols >= 0)
    return seen
