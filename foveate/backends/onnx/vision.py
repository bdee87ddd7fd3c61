"""What choosing and merging tokens behind the vision tower becomes; `foveate.kernels` explains each step.

What is picked one by one is an ONNX `Loop`; all else is TopK, which gives the first of two equal ones first.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from foveate import ops
from foveate.backends.onnx.emit import Emitter, Writer
from foveate.backends.onnx.pieces import (
    behind,
    best,
    cosines,
    every_other,
    filled,
    fixed,
    front,
    largest,
    marked,
    one_hot,
    pick,
    pick_rows,
    products,
    put,
    ranked,
    same,
    steps,
    unit,
)
from foveate.ir.program import args_of
from foveate.kernels.relevance import LEAST, ROUNDING

INF = math.inf


def _diverse_scores(emit: Emitter, node: fx.Node) -> str:
    source, keep = args_of(node)
    count = fixed(emit, node, source)
    apart = emit.op("Sub", emit.constant(1.0), cosines(emit, unit(emit, emit.value(source))))
    others = emit.op("Where", same(emit, count), emit.constant(INF), apart)
    nearest = emit.op("ReduceMin", others, emit.constant([-1]), keepdims=0)
    picks = math.ceil(keep * count)
    values = emit.constant((1 - torch.arange(picks) / count).tolist())

    def step(number: str, nearest: str, scores: str) -> list[str]:
        token = best(emit, nearest, keep=True)
        hot = emit.op("Equal", token, steps(emit, count))
        # From the first pick on, nearest is the distance to what is picked.
        first = emit.op("Equal", number, emit.constant(0))
        known = emit.op("Where", first, emit.constant(INF), nearest)
        distance = emit.op("GatherND", apart, token, batch_dims=1)
        nearest = emit.op("Where", hot, emit.constant(-INF), emit.op("Min", known, distance))
        return [nearest, emit.op("Where", hot, emit.op("Gather", values, number), scores)]

    start = filled(emit, nearest, 0.0, count)
    return emit.loop(picks, {nearest: torch.float32, start: torch.float32}, step)[1]


def _determinant_scores(emit: Emitter, node: fx.Node) -> str:
    source, relevance, keep, *theta = args_of(node)
    count = fixed(emit, node, source)
    units = unit(emit, emit.value(source))
    weight = filled(emit, units, 1.0, count) if relevance is None else emit.value(relevance)
    if theta and theta[0] is not None:
        scaled = emit.op("Mul", weight, emit.constant(float(theta[0])))
        weight = emit.op("Exp", emit.op("Div", scaled, emit.constant(float(2 * (1 - theta[0])))))
    own = emit.op("Mul", weight, weight)
    least = emit.op("Mul", own, emit.constant(ROUNDING))
    picks = math.ceil(keep * count)
    values = emit.constant([1 - number / count for number in range(picks)])
    zero, gone = emit.constant(0.0), emit.constant(-INF)

    def step(number: str, gains: str, columns: str, scores: str) -> list[str]:
        token = best(emit, gains, keep=True)
        hot = emit.op("Equal", token, steps(emit, count))
        gain = pick(emit, gains, token)
        turned = emit.unsqueeze(emit.op("GatherND", units, token, batch_dims=1), 2)
        alike = emit.op("Squeeze", emit.op("MatMul", units, turned), emit.constant([2]))
        similar = emit.op("Mul", emit.op("Mul", pick(emit, weight, token), alike), weight)
        # Columns of picks to come are 0.
        upright = emit.op("Transpose", columns, perm=[0, 2, 1])
        column = emit.unsqueeze(emit.op("GatherND", upright, token, batch_dims=1), 2)
        known = emit.op("Squeeze", emit.op("MatMul", upright, column), emit.constant([2]))
        new = emit.op("Div", emit.op("Sub", similar, known), emit.op("Sqrt", gain))
        new = emit.op("Where", emit.op("Greater", gain, zero), new, zero)
        place = emit.unsqueeze(emit.op("Equal", steps(emit, picks), number), 1)
        columns = emit.op("Where", place, emit.unsqueeze(new, 1), columns)
        left = emit.op("Sub", gains, emit.op("Mul", new, new))
        rounded = emit.op("And", emit.op("Less", left, least), emit.op("Greater", left, gone))
        left = emit.op("Where", hot, gone, emit.op("Where", rounded, zero, left))
        return [left, columns, emit.op("Where", hot, emit.op("Gather", values, number), scores)]

    none, start = filled(emit, units, 0.0, picks, count), filled(emit, units, 0.0, count)
    state = {own: torch.float32, none: torch.float32, start: torch.float32}
    return emit.loop(picks, state, step)[2]


def _relevance(emit: Emitter, node: fx.Node) -> str:
    source, question = (emit.value(x) for x in args_of(node))
    asked = emit.unsqueeze(emit.cast(question, torch.float32), 2)
    alike = emit.op("Squeeze", emit.op("MatMul", unit(emit, source), asked), emit.constant([2]))
    values = emit.op("Neg", alike)
    low, high = (emit.op(kind, values, emit.constant([1]), keepdims=1) for kind in ("ReduceMin", "ReduceMax"))
    least = emit.constant(LEAST)
    above = emit.op("Add", emit.op("Sub", values, low), least)
    return str(emit.op("Div", above, emit.op("Add", emit.op("Sub", high, low), least)))


def _distinct_scores(emit: Emitter, node: fx.Node) -> str:
    """Every round, unrolled. Which tokens are compared hangs on the order of the round before: where two are equally
    alike but for rounding, this and the kernel may go on with different ones."""
    row, source, keep, important = args_of(node)
    count = fixed(emit, node, source)
    total = math.floor(keep * count)
    first = math.floor(important * total)
    order = ranked(emit, emit.value(row), count)
    chosen, rest, left = front(emit, order, first), behind(emit, order, first), count - first
    if total > first:
        alike = cosines(emit, unit(emit, emit.value(source)))
        while left > total - first:
            even, odd = every_other(emit, rest, 0), every_other(emit, rest, 1)
            evens = (left + 1) // 2
            going = min(ops.ROUND, left - (total - first), evens)
            # Cosines to tokens that are at no odd place do not count.
            hidden = put(emit, filled(emit, odd, -INF, count), odd, filled(emit, odd, 0.0, left - evens))
            near = emit.op("Add", pick_rows(emit, alike, even), emit.unsqueeze(hidden, 1))
            by_likeness = ranked(emit, largest(emit, near), evens)
            rest = emit.concat([pick(emit, even, behind(emit, by_likeness, going)), odd], 1)
            left -= going
        chosen = emit.concat([chosen, rest], 1)
    return emit.cast(marked(emit, chosen, total, count), torch.float32)


def _visionzip(emit: Emitter, node: fx.Node) -> tuple[str, str]:
    row, metric, dominant, contextual = args_of(node)
    count = fixed(emit, node, row)
    chosen = marked(emit, ranked(emit, emit.value(row), dominant), dominant, count)
    order = ranked(emit, chosen, count, largest=False)
    others = count - dominant
    rest, stay = front(emit, order, others), behind(emit, order, others)
    step = max(1, others // max(1, contextual))
    numbers = list(range(others))[: step * contextual : step]
    joining_numbers = [number for number in range(others) if number not in numbers]
    targets, joining = (
        emit.op("Gather", rest, emit.constant(torch.tensor(places, dtype=torch.int64)), axis=1)
        for places in (numbers, joining_numbers)
    )
    weights = one_hot(emit, targets, count)
    if contextual and joining_numbers:
        units = unit(emit, emit.value(metric))
        alike = products(emit, pick_rows(emit, units, joining), pick_rows(emit, units, targets))
        joined = emit.op("Transpose", one_hot(emit, best(emit, alike), contextual), perm=[0, 2, 1])
        sums = emit.op("ReduceSum", joined, emit.constant([2]), keepdims=1)
        mean = emit.op("Div", joined, emit.op("Max", sums, emit.constant(1.0)))
        # A token is a target or joins one, never both.
        places = emit.unsqueeze(joining, 1)
        wide = emit.op("Expand", places, emit.op("Shape", mean))
        weights = emit.op("ScatterElements", weights, wide, mean, axis=2)
    dominants = one_hot(emit, stay, count)
    return emit.concat([dominants, weights], 1), emit.concat([stay, targets], 1)


def _prumerge(emit: Emitter, node: fx.Node) -> tuple[str, str, str]:
    row_node, metric, keep, plus, neighbors = args_of(node)
    count = fixed(emit, node, row_node)
    row, place = emit.value(row_node), steps(emit, count)
    rank = ranked(emit, ranked(emit, row, count), count, largest=False)
    wanted = 0 if keep is None else math.floor(keep * count) - 1
    by_score = (wanted + 1) // 2 if plus else wanted
    top = _outliers(emit, row, count) if keep is None else filled(emit, row, by_score, 1)
    stays = emit.op("Less", rank, top)
    key = emit.op("Where", stays, rank, emit.op("Add", place, emit.constant(count)))
    if plus:
        spread = _every(emit, count, top) if keep is None else _evenly(emit, stays, count, wanted)
        stays = emit.op("Or", stays, spread)
    key = emit.op("Where", stays, key, emit.op("Add", rank, emit.constant(2 * count)))
    width = count if keep is None else wanted
    chosen = front(emit, ranked(emit, key, count, largest=False), width)
    kept = emit.op("ReduceSum", emit.cast(stays, torch.int64), emit.constant([1]), keepdims=1)
    weights = _neighbors(emit, row, unit(emit, emit.value(metric)), chosen, (count, width), neighbors)
    # The sum of those that go stands right behind those that an image keeps.
    sums = emit.unsqueeze(emit.op("Where", stays, emit.constant(0.0), row), 1)
    last = emit.op("Equal", steps(emit, width + 1), kept)
    weights = emit.op("Where", emit.unsqueeze(last, 2), sums, emit.concat([weights, sums], 1))
    best_gone = ranked(emit, emit.op("Where", stays, emit.constant(4 * count), key), 1, largest=False)
    source = emit.op("Where", last, best_gone, emit.concat([chosen, best_gone], 1))
    room = min(width + 1, count)
    total = emit.op("Min", emit.op("Add", kept, emit.constant(1)), emit.constant(count))
    return front(emit, weights, room), front(emit, source, room), emit.op("Squeeze", total, emit.constant([1]))


def _neighbors(emit: Emitter, row: str, units: str, chosen: str, sizes: tuple[int, int], neighbors: int) -> str:
    """Weights [I, k, n] of all tokens in the chosen ones: 1 for themselves, and the most alike ones' row."""
    count, width = sizes
    own = emit.op("Equal", emit.unsqueeze(chosen, 2), steps(emit, count))
    alike = emit.op("Where", own, emit.constant(-INF), products(emit, pick_rows(emit, units, chosen), units))
    near = ranked(emit, alike, min(neighbors, count - 1))
    paid = filled(emit, row, emit.unsqueeze(row, 1), width, count)
    values = emit.op("GatherElements", paid, near, axis=2)
    weights = emit.op("ScatterElements", filled(emit, row, 0.0, width, count), near, values, axis=2)
    return str(emit.op("Where", own, emit.constant(1.0), weights))


def _outliers(emit: Emitter, row: str, count: int) -> str:
    """How many scores of a row lie far above its third quartile: int64 [I, 1]."""
    rising, _ = emit.op("TopK", row, emit.constant([count]), outputs=2, axis=1, largest=0)

    def quantile(share: float) -> str:
        at = float(torch.tensor(share) * (count - 1))
        below = math.floor(at)
        low, high = (emit.op("Gather", rising, emit.constant([i]), axis=1) for i in (below, math.ceil(at)))
        step, part = emit.op("Sub", high, low), at - below
        # As torch's lerp, which counts from the nearer end.
        if part < 0.5:
            return str(emit.op("Add", low, emit.op("Mul", step, emit.constant(part))))
        return str(emit.op("Sub", high, emit.op("Mul", step, emit.constant(1 - part))))

    low, high = quantile(0.25), quantile(0.75)
    fence = emit.op("Add", high, emit.op("Mul", emit.op("Sub", high, low), emit.constant(1.5)))
    far = emit.cast(emit.op("Greater", row, fence), torch.int64)
    return str(emit.op("ReduceSum", far, emit.constant([1]), keepdims=1))


def _every(emit: Emitter, count: int, top: str) -> str:
    """The uniform sample of an image that keeps `top` tokens: bool [I, n]."""
    one, place = emit.constant(1), steps(emit, count)
    apart = emit.op("Div", emit.op("Div", emit.constant(count), emit.op("Max", top, one)), emit.constant(3))
    hit = emit.op("Equal", emit.op("Mod", place, emit.op("Max", apart, one)), emit.constant(0))
    hit = emit.op("And", hit, emit.op("Less", place, emit.constant(count - 1)))
    return str(emit.op("And", hit, emit.op("Greater", top, emit.constant(0))))


def _evenly(emit: Emitter, stays: str, count: int, total: int) -> str:
    """The uniform sample among what does not stay yet, so that `total` stay: bool [I, n]."""
    chosen = (total + 1) // 2
    wanted, rest = total - chosen, count - chosen
    order = ranked(emit, emit.cast(stays, torch.int64), count, largest=False)
    numbers = torch.tensor([(2 * i + 1) * rest // max(1, 2 * wanted) for i in range(wanted)], dtype=torch.int64)
    sample = emit.op("Gather", order, emit.constant(numbers), axis=1)
    return emit.cast(marked(emit, sample, wanted, count), torch.bool)


WRITERS: dict[Any, Writer] = {
    ops.diverse_scores: _diverse_scores,
    ops.determinant_scores: _determinant_scores,
    ops.relevance: _relevance,
    ops.distinct_scores: _distinct_scores,
    ops.visionzip: _visionzip,
    ops.prumerge: _prumerge,
}
