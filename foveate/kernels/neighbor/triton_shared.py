"""What the forward and the backward kernels share: addresses, patches, halos and masks.

A *patch* is a rectangle of tokens of one image, its *halo* the tokens that it may see (or that may see it), clipped
to the image. Rows and columns inside a program are counted from the patch's first token, its *corner*, so they are
small. Streams are `triton_launch.Stream` tuples; inside one batch row offsets fit in 32 bits.
"""

import triton
import triton.language as tl

FAR = tl.constexpr(1 << 14)
"""Row of a halo slot that holds no token: farther than any radius, and its square still fits in 32 bits."""

UNSEEN = tl.constexpr(-1.0e30)
"""Score of a pair that is masked: finite, since the difference of two infinities is not a number."""


@triton.jit
def address(x, batch, head, token):
    """Where a token's elements begin, of one head or of a head for each token."""
    return x.base + batch * x.batch + (head * x.head + token * x.token)


@triton.jit
def load_rows(x, batch, head, token, valid, size: tl.constexpr, padded: tl.constexpr):
    """[tokens, padded] elements; zero where a token is not valid, and behind the head's size."""
    element = tl.arange(0, padded)
    mask = valid[:, None] & (element < size)[None, :]
    return tl.load(address(x, batch, head, token)[:, None] + element[None, :], mask=mask, other=0.0)


@triton.jit
def store_rows(x, batch, head, token, values, valid, size: tl.constexpr, padded: tl.constexpr):
    """Write what `load_rows` would read."""
    element = tl.arange(0, padded)
    mask = valid[:, None] & (element < size)[None, :]
    target = address(x, batch, head, token)[:, None] + element[None, :]
    tl.store(target, values.to(x.base.dtype.element_ty), mask=mask)


@triton.jit
def image_of(images, number):
    """Batch row, first token, height, width, first text key and end of those of an image."""
    image = images + number * 8
    batch = tl.load(image).to(tl.int64)
    first, height, width = tl.load(image + 1), tl.load(image + 2), tl.load(image + 3)
    return batch, first, height, width, tl.load(image + 4), tl.load(image + 5)


@triton.jit
def packed_patch(
    height, width, key_head, group: tl.constexpr, packed: tl.constexpr, rows: tl.constexpr, cols: tl.constexpr
):
    """Head, row and column of each matrix row of a patch with all query heads of a key head, and whether it is one.

    height, width: what is left of the image from the patch's corner on.
    """
    place = tl.arange(0, packed * rows * cols)
    member = place // (rows * cols)
    row, col = place % (rows * cols) // cols, place % cols
    return key_head * group + member, row, col, (member < group) & (row < height) & (col < width)


@triton.jit
def halo(top, left, height, width, above, below, sideways, rows: tl.constexpr, cols: tl.constexpr):
    """First row and column of a clipped halo (counted from the corner), its width, and its number of tokens."""
    first_row = tl.maximum(top - above, 0)
    first_col = tl.maximum(left - sideways, 0)
    high = tl.minimum(top + rows + below, height) - first_row
    wide = tl.minimum(left + cols + sideways, width) - first_col
    return first_row - top, first_col - left, wide, high * wide


@triton.jit
def halo_place(slot, first_row, first_col, wide, count):
    """Row and column of each halo slot, slots counted in raster order."""
    # A float product instead of an integer division. With the half added it is exact for 2**20 slots, even where the
    # reciprocal is off by two units in the last place.
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
