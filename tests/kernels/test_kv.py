"""What leaves a cache: each op is its reference, in lists, and says what its fake promises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from foveate import ops
from foveate.kernels import reference
from foveate.kernels.neighbor.reference import visible
from foveate.ops import PAD
from foveate.ops.kv import ROWS, snapkv_count, summed_pairs
from tests.kernels.prompts import HEADS, SCALE, SIZE, call, in_sequence, scattered
from tests.kernels.test_scores import coords_of
from tests.kernels.test_tokens import ragged

CHECKS = ("test_schema", "test_faketensor")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sums(rows: Tensor, q_order: Tensor, kv_heads: int) -> Tensor:
    """Rows [B, H, n, m] of real queries, added one by one."""
    found = torch.zeros(rows.shape[0], kv_heads, rows.shape[3], dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*(torch.arange(x) for x in rows.shape[:3])).tolist():
        if q_order[b, i] != PAD:
            found[b, h * kv_heads // rows.shape[1]] += rows[b, h, i]
    return found.float()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("visual", "text"), [(5, 9), (0, 4), (ROWS + 3, ROWS + 2)])
def test_attention_sums_are_the_rows_added_up(heads: tuple[int, int], visual: int, text: int) -> None:
    orders = scattered(visual, text, torch.Generator().manual_seed(1), batch=2)
    k_order = [orders["v"], orders["t"]]
    k = [drawn(2, heads[1], x.shape[1], SIZE, seed=2) for x in k_order]
    for q_order in k_order:
        q = drawn(2, heads[0], q_order.shape[1], SIZE, seed=3)
        rows = reference.probabilities(q, torch.cat(k, 2), q_order, torch.cat(k_order, 1), SCALE)
        call = (q, k, q_order, k_order, SCALE)
        with FlopCounterMode(display=False) as counter:
            found = ops.attention_sums(*call)
        torch.testing.assert_close(found, sums(rows, q_order, heads[1]))
        assert counter.get_total_flops() == 2 * q.numel() * (visual + text)
    torch.library.opcheck(ops.attention_sums, call, test_utils=CHECKS)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("prefix", [-1, 0, 4, 9])
@pytest.mark.parametrize(("visual", "text"), [(5, 9), (0, 9), (ROWS + 3, ROWS + 2)])
def test_attention_with_sums_is_both(heads: tuple[int, int], prefix: int, visual: int, text: int) -> None:
    orders = in_sequence(visual, text, prefix) if prefix >= 0 else scattered(visual, text, torch.Generator(), batch=2)
    asked = call("vt:vt", orders, heads, prefix)
    with FlopCounterMode(display=False) as counter:
        out, found = ops.attention_with_sums(**asked)
    real = torch.cat(asked["q_order"], 1) != PAD
    torch.testing.assert_close(out[real], reference.attention(**asked)[real], rtol=1e-5, atol=1e-5)
    k, k_order = asked["k"], asked["k_order"]
    parts = [ops.attention_sums(q, k, o, k_order, SCALE) for q, o in zip(asked["q"], asked["q_order"], strict=True)]
    torch.testing.assert_close(found, parts[0] + parts[1], rtol=1e-5, atol=1e-5)
    pairs = summed_pairs(visual + text, visual + text, prefix)
    assert counter.get_total_flops() == 4 * 2 * heads[0] * SIZE * pairs
    torch.library.opcheck(ops.attention_with_sums, tuple(asked.values()), test_utils=CHECKS)


@pytest.mark.parametrize("prefix", [-1, 4])
def test_gradients_of_attention_with_sums_are_those_of_attention(prefix: int) -> None:
    orders = in_sequence(5, 9, 4)
    found = []
    for op in (ops.attention, lambda **asked: ops.attention_with_sums(**asked)[0]):
        asked = call("vt:vt", orders, (4, 2), prefix)
        leaves = [x.requires_grad_() for name in "qkv" for x in asked[name]]
        found.append(torch.autograd.grad(op(**asked).square().sum(), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("metric", ["chebyshev", "euclidean", "raster"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("see_text", [True, False])
def test_neighbor_sums_are_the_rows_added_up(heads: tuple[int, int], metric: str, causal: bool, see_text: bool) -> None:
    order, coords = coords_of([[(9, 9)], [(3, 4), (2, 2)]])
    text = torch.arange(4).repeat(2, 1)
    text[0, 0] = PAD
    k = [drawn(2, heads[1], x.shape[1], SIZE, seed=4) for x in (order, text)]
    q = drawn(2, heads[0], order.shape[1], SIZE, seed=5)
    seen = torch.cat(
        [
            visible(order, coords, order, coords, 1, metric, causal),
            (text[:, None] <= order[..., None]) & see_text,
        ],
        2,
    )
    keys = torch.cat(k, 2).double().repeat_interleave(heads[0] // heads[1], 1)
    rows = (q.double() @ keys.transpose(2, 3) * SCALE).masked_fill(~seen[:, None], -math.inf).softmax(-1)
    call = (q, k, order, [order, text], coords, coords, 1, metric, causal, see_text, SCALE)
    with FlopCounterMode(display=False) as counter:
        found = ops.neighbor_sums(*call)
    torch.testing.assert_close(found, sums(rows, order, heads[1]))
    assert counter.get_total_flops() == 2 * q.numel() * (order.shape[1] + 4)
    some = torch.tensor([[3, 7, 9], [0, 2, 15]])
    part = (q.gather(2, some[:, None, :, None].expand(-1, heads[0], -1, SIZE)), k, order.gather(1, some))
    where = coords.gather(1, some[..., None].expand(-1, -1, 3))
    found = ops.neighbor_sums(*part, [order, text], where, coords, 1, metric, causal, see_text, SCALE)
    few = rows.gather(2, some[:, None, :, None].expand(-1, heads[0], -1, rows.shape[3]))
    torch.testing.assert_close(found, sums(few, part[2], heads[1]))
    torch.library.opcheck(ops.neighbor_sums, call, test_utils=CHECKS)


def streams(lengths: list[tuple[int, int]], seed: int) -> list[Tensor]:
    """Orders of a visual and a text stream of rows with that many real tokens, anywhere between each other."""
    generator = torch.Generator().manual_seed(seed)
    found = [ragged([row[i] for row in lengths], generator) for i in range(2)]
    for row, (visual, text) in enumerate(lengths):
        places = torch.randperm(visual + text + 3, generator=generator)[: visual + text]
        for order, mine in zip(found, (places[:visual], places[visual:]), strict=True):
            order[row, order[row] != PAD] = mine.sort().values
    return found


ROWS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 9)), min_size=1, max_size=3)


@settings(deadline=None, max_examples=60)
@given(lengths=ROWS, window=st.integers(1, 25), seed=st.integers(0, 99))
def test_window_tokens_are_the_last_of_all_streams(lengths: list[tuple[int, int]], window: int, seed: int) -> None:
    orders = streams(lengths, seed)
    for order, other in (orders, orders[::-1]):
        index, kept = ops.window_tokens(order, [other], window)
        assert index.shape == kept.shape == (len(lengths), min(window, order.shape[1]))
        for row in range(len(lengths)):
            last = sorted(p for p in [*order[row].tolist(), *other[row].tolist()] if p != PAD)[-window:]
            expected = [i for i, p in enumerate(order[row].tolist()) if p in last]
            spare = [PAD] * (kept.shape[1] - len(expected))
            assert kept[row].tolist() == [*order[row, expected].tolist(), *spare]
            assert index[row].tolist() == [*expected, *(0 for _ in spare)]
    torch.library.opcheck(ops.window_tokens, (orders[0], orders[1:], window), test_utils=CHECKS)


def snapkv_row(scores: list[float], capacity: float, window: int, kernel: int, pooling: str) -> list[int]:
    """What stays of scores in the order of the row."""
    n = len(scores)
    stay = min(n, int(capacity) if capacity >= 1 else max(math.floor(capacity * n), window))
    earlier = max(0, n - window)
    if stay == n:
        return list(range(n))
    pooled = []
    for i in range(earlier):
        near = scores[max(0, i - kernel // 2) : min(earlier, i + kernel // 2 + 1)]
        pooled.append(max(near) if pooling == "max" else sum(near) / kernel)
    best = sorted(range(earlier), key=lambda i: (-pooled[i], i))[: stay - window]
    return [*sorted(best), *range(earlier, n)]


@settings(deadline=None, max_examples=80)
@given(
    lengths=ROWS,
    window=st.integers(1, 12),
    extra=st.integers(1, 9) | st.floats(0.01, 0.99),
    kernel=st.sampled_from([1, 3, 5, 31]),
    pooling=st.sampled_from(["avg", "max"]),
    levels=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_snapkv_tokens_are_those_of_lists(
    lengths: list[tuple[int, int]], window: int, extra: float, kernel: int, pooling: str, levels: int, seed: int
) -> None:
    orders = streams(lengths, seed)
    order, heads = torch.cat(orders, 1), 2
    # Powers of two add up without rounding, whatever the order: few levels make many exact ties.
    kernel = kernel if pooling == "max" else 1
    scores = torch.randint(levels, (len(lengths), heads, order.shape[1])).float()
    capacity = float(extra if isinstance(extra, float) else window + extra)
    call: Any = (scores, orders, capacity, window, kernel, pooling)
    index, places = ops.snapkv_tokens(*call)
    assert index.shape == places.shape == (len(lengths), heads, snapkv_count(order.shape[1], capacity, window))
    for row in range(len(lengths)):
        in_row = [i for i in order[row].argsort().tolist() if order[row, i] != PAD]
        for head in range(heads):
            expected = [
                in_row[i] for i in snapkv_row(scores[row, head, in_row].tolist(), capacity, window, kernel, pooling)
            ]
            spare = places.shape[2] - len(expected)
            assert places[row, head].tolist() == order[row, expected].tolist() + [PAD] * spare
            assert index[row, head].tolist() == expected + [0] * spare
    torch.library.opcheck(ops.snapkv_tokens, call, test_utils=CHECKS)


@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_scores_are_averaged_over_earlier_tokens_alone(kernel: int) -> None:
    orders = [torch.arange(20)[None, ::2].contiguous(), torch.arange(20)[None, 1::2].contiguous()]
    scores = drawn(1, 1, 20, seed=kernel).abs()
    _, places = ops.snapkv_tokens(scores, orders, 9.0, 4, kernel, "avg")
    in_row = torch.cat(orders, 1)[0].argsort()
    assert places[0, 0].tolist() == snapkv_row(scores[0, 0, in_row].tolist(), 9.0, 4, kernel, "avg")


def test_take_keys_takes_from_every_stream() -> None:
    x = [drawn(2, 3, n, SIZE, seed=n) for n in (4, 0, 5)]
    index = torch.randint(9, (2, 3, 6), generator=torch.Generator().manual_seed(0))
    found = ops.take_keys(x, index)
    whole = torch.cat(x, 2)
    for b, h, c in torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(6)).tolist():
        assert torch.equal(found[b, h, c], whole[b, h, index[b, h, c]])
    torch.library.opcheck(ops.take_keys, (x, index), test_utils=CHECKS)
    torch.library.opcheck(ops.take_keys, (x[:1], index.clamp(max=3)), test_utils=CHECKS)


@settings(deadline=None, max_examples=80)
@given(
    lengths=ROWS,
    heavy=st.integers(0, 12) | st.floats(0.01, 0.99),
    recent=st.integers(1, 12) | st.floats(0.01, 0.99),
    levels=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_heavy_tokens_are_those_of_lists(
    lengths: list[tuple[int, int]], heavy: float, recent: float, levels: int, seed: int
) -> None:
    orders = streams(lengths, seed)
    order, heads = torch.cat(orders, 1), 2
    sums = torch.randint(levels, (len(lengths), heads, order.shape[1])).float()
    call: Any = (sums, orders, float(heavy), float(recent))
    index, places, kept, budget = ops.heavy_tokens(*call)
    for row in range(len(lengths)):
        in_row = [i for i in order[row].argsort().tolist() if order[row, i] != PAD]
        most = math.floor(heavy * len(in_row)) if isinstance(heavy, float) else heavy
        last = math.ceil(recent * len(in_row)) if isinstance(recent, float) else recent
        assert budget[row].tolist() == [most, last]
        earlier, late = in_row[: max(0, len(in_row) - last)], in_row[max(0, len(in_row) - last) :]
        for head in range(heads):
            ranked = sorted(range(len(earlier)), key=lambda i: (-sums[row, head, earlier[i]].item(), i))
            expected = [earlier[i] for i in sorted(ranked[:most])] + late
            spare = places.shape[2] - len(expected)
            assert places[row, head].tolist() == order[row, expected].tolist() + [PAD] * spare
            assert index[row, head].tolist() == expected + [0] * spare
            assert kept[row, head].tolist() == sums[row, head, expected].tolist() + [0.0] * spare
    torch.library.opcheck(ops.heavy_tokens, call, test_utils=CHECKS)


def test_two_halves_are_the_whole() -> None:
    for tokens in range(1, 3000):
        assert ops.heavy_recent_count(tokens, 0.5, 0.5) == tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_narrow_types_are_added_up_in_fp32(dtype: torch.dtype) -> None:
    order = torch.arange(300)[None]
    q, k = drawn(1, 4, 300, SIZE).to(dtype), drawn(1, 2, 300, SIZE, seed=1).to(dtype)
    found = ops.attention_sums(q, [k], order, [order], SCALE)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(2), torch.full((1, 2), 600.0), atol=1e-2, rtol=1e-5)
    torch.testing.assert_close(
        found, ops.attention_sums(q.float(), [k.float()], order, [order], SCALE), atol=2, rtol=0.05
    )
