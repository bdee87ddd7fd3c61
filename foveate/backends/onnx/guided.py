"""Choosing visual tokens by the text and by likeness, and clusters of those that go; all rows of a batch at once.

Eager treats rows one by one, since each has its own number of tokens. Here every row has as many slots as the largest
could need, and masks say which of them count.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from foveate import ops
from foveate.backends.onnx.attention import visible
from foveate.backends.onnx.emit import Emitter, Writer
from foveate.backends.onnx.fit import behind_images, real, share
from foveate.backends.onnx.scoring import softmaxed
from foveate.backends.onnx.selection import floor_share
from foveate.backends.onnx.sorting import best, counted, marked, ranks, steps, widened
from foveate.ir.program import args_of
from foveate.ir.rewriter import shape

LOWEST = float("-inf")

SAME = 2.0**-44
"""Squared distances below this share of both points' squares are rounding: of the same tokens, or all but the same."""


def _raters(emit: Emitter, node: fx.Node) -> str:
    visual, text, visual_order, text_order = (emit.value(x) for x in args_of(node))
    asked, there = behind_images(emit, visual_order, text_order), real(emit, visual_order)
    alike = emit.op("MatMul", visual, emit.op("Transpose", text, perm=[0, 2, 1]))
    hidden = emit.op("Where", emit.unsqueeze(asked, 1), emit.cast(alike, torch.float32), emit.constant(LOWEST))
    # Where no text asks, every row is no number.
    seen = emit.op("Where", emit.unsqueeze(asked, 1), emit.op("Softmax", hidden, axis=2), emit.constant(0.0))
    weighted = emit.op("Where", emit.unsqueeze(there, 2), seen, emit.constant(0.0))
    total = emit.op("ReduceSum", weighted, emit.constant([1]), keepdims=0)
    mean = emit.op("Div", total, _at_least_one(emit, counted(emit, there)))
    average = emit.op("ReduceSum", mean, emit.constant([1]), keepdims=1)
    average = emit.op("Div", average, _at_least_one(emit, counted(emit, asked)))
    return emit.cast(str(emit.op("And", emit.op("Greater", mean, average), asked)), torch.float32)


def _at_least_one(emit: Emitter, count: str) -> str:
    """A count as a divisor, fp32."""
    return emit.cast(str(emit.op("Max", count, emit.constant([1]))), torch.float32)


def _rater_scores(emit: Emitter, node: fx.Node) -> str:
    q, k, q_order, k_order, chosen, scale = args_of(node)
    rows = softmaxed(emit, q, k, visible(emit, [q_order], k_order), scale)
    rows = emit.slice(rows, 3, emit.constant([0]), emit.length(emit.value(k[0]), 2))
    mean = emit.op("ReduceMean", rows, emit.constant([1]), keepdims=0)
    asks = str(emit.op("Greater", emit.value(chosen), emit.constant(0.0)))
    counts = emit.op("Where", emit.unsqueeze(asks, 2), mean, emit.constant(0.0))
    weighted = emit.op("Mul", counts, emit.unsqueeze(share(emit, asks), 2))
    return str(emit.op("ReduceSum", weighted, emit.constant([1]), keepdims=0))


def _merge_tokens(emit: Emitter, node: fx.Node) -> str:
    x, weights = args_of(node)
    return str(emit.op("MatMul", emit.cast(emit.value(weights), x.meta["val"].dtype), emit.value(x)))


def _dart_scores(emit: Emitter, node: fx.Node) -> str:
    """Each pivot's turn ranks what is left; a row's share of it is taken, by rank."""
    keys, x, order, text_keys, text, text_order, keep, pivots = args_of(node)
    visual = emit.value(order)
    slots = emit.length(visual, 1)
    asked = behind_images(emit, visual, emit.value(text_order))
    # As many more tokens as there are pivots, so that there are always enough to point at.
    wide = widened(emit, visual, 2, 1, ops.PAD, pivots)
    there = real(emit, wide)
    total = floor_share(emit, counted(emit, there), keep)
    own_rank, own_place = _largest(emit, keys, there, pivots)
    _, text_place = _largest(emit, text_keys, widened(emit, asked, 2, 1, False, pivots), pivots)
    own = emit.op("Min", total, emit.constant([pivots]))
    words = emit.op("Min", counted(emit, asked), emit.constant([pivots]))
    asking = emit.op("Max", emit.op("Add", own, words), emit.constant([1]))
    unit = _unit(emit, widened(emit, _float(emit, x), 3, 1, 0.0, pivots))
    unit_text = _unit(emit, widened(emit, _float(emit, text), 3, 1, 0.0, pivots))
    found = [
        emit.op("GatherND", each, emit.unsqueeze(place, 2), batch_dims=1)
        for each, place in ((unit, own_place), (unit_text, text_place))
    ]
    alike = emit.op("MatMul", unit, emit.op("Transpose", emit.concat(found, 1), perm=[0, 2, 1]))
    mine = emit.op("And", there, emit.op("Less", own_rank, own))
    left = emit.op("And", there, emit.op("Not", mine))
    wanted = emit.op("Sub", total, own)
    each, rest = emit.op("Div", wanted, asking), emit.op("Mod", wanted, asking)
    picked, taken, place = mine, own, own_rank
    for slot in range(2 * pivots):
        # The number of a pivot among those of its row, which has none in the slots that it leaves empty.
        late = slot >= pivots
        number = emit.op("Add", own, emit.constant([slot - pivots])) if late else emit.constant([slot])
        last = emit.op("Add", own, words) if late else own
        some = emit.op("Add", each, emit.cast(str(emit.op("Less", number, rest)), torch.int64))
        some = emit.op("Where", emit.op("Less", number, last), some, emit.constant(0))
        near = emit.op("Gather", alike, emit.constant(slot), axis=2)
        rank = ranks(emit, str(emit.op("Where", left, near, emit.constant(math.inf))), largest=False)
        new = emit.op("And", left, emit.op("Less", rank, some))
        left = emit.op("And", left, emit.op("Not", new))
        place = emit.op("Where", new, emit.op("Add", taken, rank), place)
        picked, taken = emit.op("Or", picked, new), emit.op("Add", taken, some)
    down = emit.op("Div", emit.cast(place, torch.float32), _at_least_one(emit, slots))
    scores = emit.op("Where", picked, emit.op("Sub", emit.constant(1.0), down), emit.constant(0.0))
    return emit.slice(str(scores), 1, emit.constant([0]), slots)


def _largest(emit: Emitter, keys: fx.Node, there: str, count: int) -> tuple[str, str]:
    """Of tokens that are there, each one's rank by the size of its keys [B, Hk, n, e], and the places of the first.

    there bool [B, n + count] -> int64 [B, n + count] and [B, count].
    """
    size = emit.op("ReduceL1", _float(emit, keys), emit.constant([1, 3]), keepdims=0)
    wide = widened(emit, str(size), 2, 1, 0.0, count)
    sizes = str(emit.op("Where", there, wide, emit.constant(LOWEST)))
    return ranks(emit, sizes), best(emit, sizes, 2, emit.constant([count]))


def _float(emit: Emitter, node: fx.Node) -> str:
    value = emit.value(node)
    return value if node.meta["val"].dtype == torch.float32 else emit.cast(value, torch.float32)


def _unit(emit: Emitter, x: str) -> str:
    """Vectors of length 1, as torch's `normalize`."""
    norm = emit.op("ReduceL2", x, emit.constant([2]), keepdims=1)
    return str(emit.op("Div", x, emit.op("Max", norm, emit.constant(1e-12))))


def _clusters(emit: Emitter, gone: str) -> str:
    """`foveate.ops.cluster_count`, of int64."""
    positive = emit.op("Max", gone, emit.constant([0]))
    return str(emit.op("Min", _tenth(emit, _members(emit, str(positive))), gone))


def _members(emit: Emitter, gone: str) -> str:
    """How many of the tokens that go are looked at, where some go."""
    tenth = emit.op("Div", emit.op("Mul", gone, emit.constant([3])), emit.constant([10]))
    return str(emit.op("Add", tenth, emit.constant([1])))


def _tenth(emit: Emitter, count: str) -> str:
    return str(emit.op("Add", emit.op("Div", count, emit.constant([10])), emit.constant([1])))


def _recycle_tokens(emit: Emitter, node: fx.Node) -> tuple[str, str, str]:
    """Clusters are made among slots for members, of which the longest row has as many as could go of all tokens."""
    scores, order, x, whole, keep = args_of(node)
    places, tokens = emit.value(order), emit.length(emit.value(order), 1)
    stay = floor_share(emit, emit.length(emit.value(whole), 1), keep)
    width = emit.op("Add", stay, _clusters(emit, str(emit.op("Sub", tokens, stay))))
    # One more token, which is padding, so that no axis is empty.
    wide_order = widened(emit, places, 2, 1, ops.PAD)
    score = widened(emit, emit.value(scores), 2, 1, 0.0)
    there, low = real(emit, wide_order), emit.constant(LOWEST)
    wanted = floor_share(emit, counted(emit, real(emit, emit.value(whole))), keep)
    rank = ranks(emit, str(emit.op("Where", there, score, low)))
    stays = emit.op("And", there, emit.op("Less", rank, wanted))
    gone = str(emit.op("And", there, emit.op("Not", stays)))
    count = counted(emit, gone)
    looked = emit.op("Less", ranks(emit, str(emit.op("Where", gone, score, low))), _members(emit, count))
    member = str(emit.op("And", gone, looked))

    groups = _Groups(emit, x, member, _members(emit, tokens), _clusters(emit, count))
    centre = emit.op("And", member, groups.of_tokens(groups.is_centre))
    index = marked(emit, str(emit.op("Or", stays, centre)), str(width))
    total = emit.length(wide_order, 1)
    spare = emit.op("Equal", index, total)
    pointed = emit.op("Where", spare, emit.constant(0), index)
    kept = emit.op("Where", spare, emit.constant(ops.PAD), emit.op("GatherElements", wide_order, pointed, axis=1))
    # Which token each becomes a part of, and by what share; -1: of none.
    owner = emit.op("Where", member, groups.of_tokens(groups.owner), emit.constant(-1))
    owner = emit.op("Where", stays, steps(emit, total), owner)
    part = emit.op("Where", member, groups.of_tokens(groups.part), emit.constant(1.0))
    same = emit.op("Equal", emit.unsqueeze(index, 2), emit.unsqueeze(str(owner), 1))
    weights = emit.op("Where", same, emit.unsqueeze(str(part), 1), emit.constant(0.0))
    return str(pointed), str(kept), emit.slice(str(weights), 2, emit.constant([0]), tokens)


class _Groups:
    """Members [B, n] in M slots, in their old order, around density peaks; a value a slot, [B, M], in each field.

    is_centre: whether the member is a peak; owner: the token that is its peak; part: its share of its cluster.
    """

    def __init__(self, emit: Emitter, x: fx.Node, member: str, width: str, clusters: str) -> None:
        """width: M, int64 [1]; clusters: how many each row has, int64 [B, 1]."""
        self.emit = emit
        tokens = emit.length(member, 1)
        slot = emit.op("CumSum", emit.cast(member, torch.int64), emit.constant(1))
        self.slot = emit.op("Max", emit.op("Sub", slot, emit.constant(1)), emit.constant(0))
        found = marked(emit, member, width)
        valid = emit.op("Less", found, tokens)
        at = str(emit.op("Where", valid, found, emit.constant(0)))
        distance = _distances(emit, x, at, str(valid))
        inf, low, number = emit.constant(math.inf), emit.constant(LOWEST), steps(emit, width)
        # Slots that hold no member are far from all, and less dense than all.
        most = _tenth(emit, width)
        near = emit.op("Where", emit.unsqueeze(str(valid), 1), distance, inf)
        near, _ = emit.op("TopK", near, most, outputs=2, axis=2, largest=0)
        counts = emit.op("Less", steps(emit, most), emit.unsqueeze(clusters, 2))
        near = emit.op("Where", counts, emit.op("Mul", near, near), emit.constant(0.0))
        total = emit.op("ReduceSum", near, emit.constant([2]), keepdims=0)
        density = emit.op("Exp", emit.op("Neg", emit.op("Div", total, _at_least_one(emit, clusters))))
        density = emit.op("Where", valid, density, emit.constant(-1.0))
        own, other = emit.unsqueeze(str(density), 2), emit.unsqueeze(str(density), 1)
        before = emit.op("Less", number, emit.unsqueeze(number, 1))
        denser = emit.op("Or", emit.op("Greater", other, own), emit.op("And", emit.op("Equal", other, own), before))
        farthest = emit.op("ReduceMax", distance, emit.constant([1, 2]), keepdims=1)
        peak = emit.op("ReduceMin", emit.op("Where", denser, distance, farthest), emit.constant([2]), keepdims=0)
        height = emit.op("Where", valid, emit.op("Mul", peak, density), low)
        centre = emit.op("And", valid, emit.op("Less", ranks(emit, str(height)), clusters))
        self.is_centre = str(centre)
        close = emit.op("Where", emit.unsqueeze(self.is_centre, 1), distance, inf)
        nearest = emit.op("Where", centre, number, emit.op("ArgMin", close, axis=2, keepdims=0))
        self.owner = str(emit.op("GatherElements", at, nearest, axis=1))
        together = emit.op("Equal", emit.unsqueeze(str(nearest), 2), emit.unsqueeze(str(nearest), 1))
        together = emit.op("And", together, emit.unsqueeze(str(valid), 1))
        size = emit.op("ReduceSum", emit.cast(str(together), torch.float32), emit.constant([2]), keepdims=0)
        self.part = str(emit.op("Div", emit.constant(1.0), size))

    def of_tokens(self, value: str) -> str:
        """A slot's value where its token is; anything where there is no member."""
        return str(self.emit.op("GatherElements", value, self.slot, axis=1))


def _distances(emit: Emitter, x: fx.Node, at: str, valid: str) -> str:
    """Distances between tokens at slots, divided by the root of their width: fp32 [B, M, M], 0 where either is none.

    By matrix products, in fp64, so that no tensor of all pairs has a token's width and near tokens stay near.
    """
    wide = widened(emit, _float(emit, x), 3, 1, 0.0)
    points = emit.cast(str(emit.op("GatherND", wide, emit.unsqueeze(at, 2), batch_dims=1)), torch.float64)
    product = emit.op("MatMul", points, emit.op("Transpose", points, perm=[0, 2, 1]))
    square = str(emit.op("ReduceSum", emit.op("Mul", points, points), emit.constant([2]), keepdims=0))
    both = emit.op("Add", emit.unsqueeze(square, 2), emit.unsqueeze(square, 1))
    apart = emit.op("Sub", both, emit.op("Mul", product, emit.constant(2.0, torch.float64)))
    far = emit.op("Greater", apart, emit.op("Mul", both, emit.constant(SAME, torch.float64)))
    pairs = emit.op("And", emit.unsqueeze(valid, 2), emit.unsqueeze(valid, 1))
    apart = emit.op("Where", emit.op("And", far, pairs), apart, emit.constant(0.0, torch.float64))
    distance = emit.cast(str(emit.op("Sqrt", apart)), torch.float32)
    return str(emit.op("Div", distance, emit.constant(math.sqrt(int(shape(x)[2])))))


WRITERS: dict[Any, Writer] = {
    ops.raters: _raters,
    ops.rater_scores: _rater_scores,
    ops.recycle_tokens: _recycle_tokens,
    ops.merge_tokens: _merge_tokens,
    ops.dart_scores: _dart_scores,
}
