"""What foveate's attention ops become: ONNX `Attention` for a prompt, plain matmuls a key stream for a step.

    attention([q], [k cached, k new], ...)   ->   softmax(concat(q k1', q k2')) split on v1, v2    no cache is joined
    attention([q1, q2], [k1, k2], ...)       ->   Attention(concat q, concat k, concat v, mask of the orders)

The orders say what is visible, padding and removed tokens included, so one graph serves every batch. The mask of a
pair of orders is computed once and read by all layers that share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from foveate import ops
from foveate.backends.onnx import plugin
from foveate.backends.onnx.aten import dtype_of
from foveate.backends.onnx.emit import END, Emitter, Writer
from foveate.backends.onnx.packed import Segments
from foveate.backends.onnx.scoring import Scoring, softmaxed
from foveate.ir.program import args_of
from foveate.ir.rewriter import shape

aten = torch.ops.aten


def joined(emit: Emitter, nodes: Sequence[fx.Node], axis: int) -> str:
    """Streams one behind the other; those that were cut out of one value are that value again."""
    whole = _whole(nodes, axis)
    return emit.value(whole) if whole is not None else emit.concat([emit.value(n) for n in nodes], axis)


def _whole(nodes: Sequence[fx.Node], axis: int) -> fx.Node | None:
    if len(nodes) < 2 or any(n.target != aten.slice.Tensor for n in nodes):
        return None
    cuts = [args_of(n) for n in nodes]
    source = cuts[0][0]
    at = 0
    for found, dim, start, stop in cuts:
        if found is not source or dim % len(shape(source)) != axis or (start is not at and start != at):
            return None
        at = stop
    return source if at == END else None


def visible(
    emit: Emitter,
    q_order: Sequence[fx.Node],
    k_order: Sequence[fx.Node],
    reach: Sequence[fx.Node] | None = None,
    window: int = 0,
) -> str:
    """Which keys a query sees: bool [B, n, m]."""
    orders = (q_order, k_order, q_order if reach is None else reach)
    queries, keys, last = (emit.concat([emit.value(n) for n in each], 1) for each in orders)
    seen = emit.op("LessOrEqual", emit.unsqueeze(keys, 1), emit.unsqueeze(last, 2))
    if window:
        first = emit.op("Sub", emit.unsqueeze(queries, 2), emit.constant(window))
        seen = emit.op("And", seen, emit.op("Less", first, emit.unsqueeze(keys, 1)))
    return str(seen)


def dense(emit: Emitter, q: str, k: str, v: str, seen: str, scoring: Scoring, maybe_none: bool = False) -> str:
    """Attention [B, H, n, e] under a mask bool [B, n, m]; scores are in fp32.

    maybe_none: there may be no query or no key at all, which ONNX Runtime's operator refuses: there is one more of
    each, a query that sees all and a key that no other sees.
    """
    if not maybe_none:
        return scoring.attend(emit, q, k, v, seen)
    more = _one_more(emit, q, k, v, seen)
    return emit.slice(dense(emit, *more, scoring), 2, emit.constant([0]), emit.length(q, 2))


def _one_more(emit: Emitter, q: str, k: str, v: str, seen: str) -> tuple[str, str, str, str]:
    """One query more, at the end, that sees all, and one key more that no other sees."""
    queries, keys, values = (emit.op("Pad", x, emit.constant([0, 0, 0, 0, 0, 0, 1, 0])) for x in (q, k, v))
    # No Pad, which not every runtime has for bool.
    for axis, value in ((2, False), (1, True)):
        sizes = [emit.length(seen, 0), emit.length(seen, 1), emit.length(seen, 2)]
        sizes[axis] = emit.constant([1])
        seen = emit.concat([seen, emit.op("Expand", emit.constant(value), emit.concat(sizes, 0))], axis)
    return queries, keys, values, seen


def attention(emit: Emitter, node: fx.Node) -> str:
    """`foveate::attention`, or what another op has of it: the first arguments are the same."""
    q, k, v, q_order, k_order, _, layout, scale, *more = args_of(node)
    seen = visible(emit, q_order, k_order, *more)
    if layout.startswith("t:") and layout.count("t") > 2:
        out = by_streams(emit, q, k, v, seen, scale)
    else:
        scoring = Scoring.of(q[0], k[0], scale)
        queries, keys, values = (joined(emit, x, 2) for x in (q, k, v))
        if (
            emit.blocks > 1
            and layout == "vt:vt"
            and not more
            and all(n.op == "placeholder" for n in (*q_order, *k_order))
        ):
            out = in_blocks(emit, queries, keys, values, seen, emit.length(emit.value(k_order[0]), 1), scoring)
        else:
            out = dense(emit, queries, keys, values, seen, scoring, maybe_none=layout.startswith("v:"))
    return str(emit.op("Transpose", out, perm=[0, 2, 1, 3]))


def in_blocks(
    emit: Emitter, q: str, k: str, v: str, seen: str, visual: str, scoring: Scoring, band: int | None = None
) -> str:
    """As `dense` for visual tokens [.., visual] with text behind them, whose order rises: no block sees all keys.

    A block of queries looks at the visual keys up to its own end or, with a `band`, at those that are not farther from
    it than that, and at all text. Blocks are equally long; the last ones overlap where the length is not divisible.
    """
    total = emit.length(q, 2)
    size = emit.op("Div", emit.op("Add", total, emit.constant([emit.blocks - 1])), emit.constant([emit.blocks]))
    outs = []
    for number in range(emit.blocks):
        first = emit.op("Mul", size, emit.constant([number]))
        start = emit.op("Min", first, emit.op("Sub", total, size))
        end = emit.op("Add", start, size)
        low, high = emit.constant([0]), end
        if band is not None:
            low = emit.op("Max", emit.op("Sub", start, emit.constant([band])), low)
            high = emit.op("Min", emit.op("Add", end, emit.constant([band])), visual)
        behind = emit.op("Max", high, visual)

        def looks(value: str, axis: int, low: str = low, high: str = high, behind: str = behind) -> str:
            rest = emit.slice(value, axis, behind, emit.constant([END]))
            return emit.concat([emit.slice(value, axis, low, high), rest], axis)

        rows, mask = emit.slice(q, 2, start, end), emit.slice(seen, 1, start, end)
        whole = band is None and number == emit.blocks - 1
        keys = (k, v, mask) if whole else (looks(k, 2), looks(v, 2), looks(mask, 2))
        out = dense(emit, rows, *keys, scoring)
        outs.append(emit.slice(out, 2, emit.op("Sub", first, start), emit.constant([END])))
    return emit.concat(outs, 2)


def by_streams(
    emit: Emitter, q: Sequence[fx.Node], k: Sequence[fx.Node], v: Sequence[fx.Node], seen: str, scale: float
) -> str:
    """As `dense`, one matmul a key stream: only scores are put together, never a cache."""
    rows = softmaxed(emit, q[0], k, seen, scale)
    scoring = Scoring.of(q[0], k[0], scale)
    return scoring.mixed(emit, rows, [emit.value(stream) for stream in v], emit.value(q[0]))


def _encoder_attention(emit: Emitter, node: fx.Node) -> str:
    q, k, v, scale, *bias = args_of(node)
    added = None
    if bias and bias[0] is not None:
        # ONNX Runtime wants a row for each query.
        hides, rows = emit.value(bias[0]), emit.length(emit.value(q), 2)
        sizes = emit.concat([emit.length(hides, 0), emit.constant([1]), rows, emit.length(hides, 1)], 0)
        added = emit.op("Expand", emit.cast(emit.unsqueeze(hides, 1, 2), dtype_of(q)), sizes)
    queries, keys, values = (emit.value(x) for x in (q, k, v))
    out = Scoring.of(q, k, scale).attend(emit, queries, keys, values, added=added)
    return str(emit.op("Transpose", out, perm=[0, 2, 1, 3]))


def _varlen_attention(emit: Emitter, node: fx.Node) -> str:
    """One batched call over padded segments: no score between two of them."""
    q, k, v, bounds, scale = args_of(node)
    heads, size = int(shape(q)[1]), int(shape(q)[3])
    segments = Segments(emit, bounds)
    queries, keys, values = (segments.heads(x) for x in (q, k, v))
    out = dense(emit, queries, keys, values, segments.seen(), Scoring.of(q, k, scale))
    rows = emit.op("Transpose", out, perm=[0, 2, 1, 3])
    return emit.unsqueeze(segments.flat(rows, emit.length(emit.value(q), 2), heads, size), 0)


def _attention_row(emit: Emitter, node: fx.Node) -> str:
    q, k, q_order, k_order, scale = args_of(node)
    rows = softmaxed(emit, q, k, visible(emit, [q_order], k_order), scale)
    return emit.slice(rows, 3, emit.constant([0]), emit.length(emit.value(k[0]), 2))


def _neighbor_attention(emit: Emitter, node: fx.Node) -> str:
    q, k, v, q_order, k_order, coords, _, radius, metric, causal, scale = args_of(node)
    mask = around(emit, (q_order, coords), (k_order, coords), radius, metric, causal)
    # A padded query sees nothing near; what it gives means nothing, but must be finite.
    padded = emit.op("Equal", emit.value(q_order), emit.constant(ops.PAD))
    mask = emit.op("Or", mask, emit.unsqueeze(padded, 2))
    scoring = Scoring.of(q, k[0], scale)
    if emit.plugin and (kernel := plugin.kernel_of(emit, node)):

        def body(q: str, k: str, v: str, text_k: str, text_v: str, _: str, seen: str) -> str:
            keys, values = emit.concat([k, text_k], 2), emit.concat([v, text_v], 2)
            out = dense(emit, q, keys, values, seen, scoring, maybe_none=True)
            return str(emit.op("Transpose", out, perm=[0, 2, 1, 3]))

        return plugin.call(emit, node, kernel, mask, body)
    parts, band = (emit.value(q), joined(emit, k, 2), joined(emit, v, 2), mask), _band(emit, radius, metric)
    if band is None or q_order.op != "placeholder":
        out = dense(emit, *parts, scoring, maybe_none=True)
    else:
        visual, total = emit.length(emit.value(k[0]), 2), emit.length(parts[0], 2)
        out = in_blocks(emit, *_one_more(emit, *parts), visual, scoring, band)
        out = emit.slice(out, 2, emit.constant([0]), total)
    return str(emit.op("Transpose", out, perm=[0, 2, 1, 3]))


def _band(emit: Emitter, radius: int, metric: str) -> int | None:
    """How far apart neighbours stand in the visual stream at most; None where that is not known, or saves nothing.

    Known is it where every image has the same grid, row by row, and the tower neither chooses nor orders tokens.
    """
    about = emit.program.info
    if emit.blocks == 1 or not about.uniform or emit.program.shortens:
        return None
    band = radius if metric == "raster" else radius * (about.grid[1] + 1)
    return band if 2 * band < about.tokens_per_image else None


def around(
    emit: Emitter,
    queries: tuple[fx.Node, fx.Node],
    keys: tuple[Sequence[fx.Node], fx.Node],
    radius: int,
    metric: str,
    causal: bool,
    see_text: bool = True,
) -> str:
    """Which keys a visual query sees that looks at its neighbours and, with `see_text`, at earlier text: [B, n, m].

    queries: order and coordinates; keys: the orders of every stream, the visual one first, and its coordinates.
    """
    (q_order, q_coords), (k_orders, coords) = queries, keys
    own, key = emit.unsqueeze(emit.value(q_order), 2), emit.value(k_orders[0])
    near = _near(emit, emit.value(q_coords), emit.value(coords), emit.value(q_order), key, radius, metric)
    near = emit.op("And", near, emit.unsqueeze(emit.op("Not", emit.op("Equal", key, emit.constant(ops.PAD))), 1))
    if causal:
        near = emit.op("And", near, emit.op("LessOrEqual", emit.unsqueeze(key, 1), own))
    if len(k_orders) == 1:
        return str(near)
    text = visible(emit, [q_order], k_orders[1:])
    if not see_text:
        text = emit.op("And", text, emit.constant(False))
    return emit.concat([near, text], 2)


def _near(emit: Emitter, q_coords: str, coords: str, q_order: str, order: str, radius: int, metric: str) -> str:
    """Pairs of tokens of an image that are not farther apart than `radius`: bool [B, n, m]."""

    def apart(query: str, key: str) -> str:
        return str(emit.op("Sub", emit.unsqueeze(query, 2), emit.unsqueeze(key, 1)))

    image, row, column = (
        apart(*(str(emit.op("Gather", x, emit.constant(i), axis=2)) for x in (q_coords, coords))) for i in range(3)
    )
    same = emit.op("Equal", image, emit.constant(0))
    if metric == "raster":
        far = emit.op("Abs", apart(q_order, order))
    elif metric == "euclidean":
        squares = [emit.op("Mul", x, x) for x in (row, column)]
        far, radius = emit.op("Add", *squares), radius * radius
    else:
        far = emit.op("Max", *(emit.op("Abs", x) for x in (row, column)))
    return str(emit.op("And", same, emit.op("LessOrEqual", far, emit.constant(radius))))


WRITERS: dict[Any, Writer] = {
    ops.attention: attention,
    ops.encoder_attention: _encoder_attention,
    ops.varlen_attention: _varlen_attention,
    ops.attention_row: _attention_row,
    ops.neighbor_attention: _neighbor_attention,
}
