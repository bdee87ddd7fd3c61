"""Merges inside the vision tower: each is a slow reference in plain lists, and says what its fake promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from foveate import ops
from foveate.kernels import attention, counting, reference, tower
from tests.kernels.prompts import SCALE, SIZE
from tests.kernels.test_scores import CHECKS, drawn


def sizes_of(images: int, count: int, seed: int) -> Tensor:
    return torch.randint(1, 5, (images, count), generator=torch.Generator().manual_seed(seed)).float()


def source_of(images: int, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.cat([torch.tensor([-1]), torch.randperm(count - 1, generator=generator)]) for _ in range(images)]
    return torch.stack(rows)


def same(found: tower.Matched, expected: tower.Matched) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b)


@settings(deadline=None, max_examples=60)
@given(images=st.integers(1, 3), count=st.integers(2, 30), data=st.data(), seed=st.integers(0, 99))
def test_tome_is_the_reference(images: int, count: int, data: st.DataObject, seed: int) -> None:
    merge = data.draw(st.integers(0, (count - 1) // 2), "merge")
    size = data.draw(st.sampled_from([None, sizes_of(images, count, seed)]), "size")
    sort = data.draw(st.booleans(), "sort")
    keys, source = drawn((images, 2, count, 5), seed), source_of(images, count, seed)
    same(tower.tome(keys, size, source, merge, sort), reference.tome(keys, size, source, merge, sort))


def test_tome_of_more_tokens_than_a_tile() -> None:
    keys, source = drawn((1, 2, 2 * tower.BLOCK + 31, 5), 1), source_of(1, 2 * tower.BLOCK + 31, 1)
    same(tower.tome(keys, None, source, 100, True), reference.tome(keys, None, source, 100, True))


def test_tome_of_equal_tokens_takes_the_first() -> None:
    keys, source = torch.ones(1, 2, 9, 4), torch.arange(9)[None] - 1
    into, weight, size, places = tower.tome(keys, None, source, 2, False)
    assert into.tolist() == [[0, 3, 3, 4, 3, 5, 1, 6, 2]]
    assert size.tolist() == [[1, 1, 1, 3, 1, 1, 1]] and places.tolist() == [[-1, 5, 7, 0, 2, 4, 6]]
    torch.testing.assert_close(weight, torch.tensor([[1, 1 / 3, 1 / 3, 1, 1 / 3, 1, 1, 1, 1]]))


@settings(deadline=None, max_examples=40)
@given(images=st.integers(0, 3), count=st.integers(1, 20), data=st.data(), seed=st.integers(0, 99))
def test_join_tokens_is_a_product_of_matrices(images: int, count: int, data: st.DataObject, seed: int) -> None:
    merged = data.draw(st.integers(0, count - 1), "merged")
    generator = torch.Generator().manual_seed(seed)
    into = torch.randint(0, count - merged, (images, count), generator=generator)
    x, weight = drawn((images, count, 3), seed).double().requires_grad_(), drawn((images, count), seed + 1)
    onto = torch.nn.functional.one_hot(into, count - merged).double() * weight[..., None]
    expected = onto.transpose(1, 2) @ x
    found = ops.join_tokens(x, into, weight, merged)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.sin().sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*grads)


def test_join_tokens_sums_narrow_numbers_widely() -> None:
    x = torch.full((1, 1000, 1), 1.0, dtype=torch.bfloat16)
    out = tower.join_tokens(x, torch.zeros(1, 1000, dtype=torch.int64), torch.full((1, 1000), 0.001), 999)
    assert out.dtype == torch.bfloat16 and out.item() == 1.0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoder_attention_with_a_bias_of_keys(masked: bool, dtype: torch.dtype) -> None:
    q, k, v = (drawn((3, 2, 17, SIZE), seed).to(dtype) for seed in range(3))
    bias = sizes_of(3, 17, 0).log()
    if masked:
        bias[:, 11:] = -torch.inf
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 5e-2, "atol": 5e-2}
    found = attention.encoder_attention(q, k, v, SCALE, bias)
    torch.testing.assert_close(found, reference.encoder_attention(q, k, v, SCALE, bias), **close)
    assert found.dtype == dtype
    if masked:
        alone = attention.encoder_attention(q, k[:, :, :11], v[:, :, :11], SCALE, bias[:, :11])
        torch.testing.assert_close(found, alone, **close)


def test_gradients_beside_a_bias_of_keys() -> None:
    given = [drawn((2, 3, 9, SIZE), seed).double().requires_grad_() for seed in range(3)]
    bias = sizes_of(2, 9, 0).log().double()
    weight = drawn((2, 9, 3, SIZE), 5)
    found, expected = (
        torch.autograd.grad((f(*given, SCALE, bias) * weight).sum(), given)
        for f in (ops.encoder_attention, reference.encoder_attention)
    )
    torch.testing.assert_close(found, expected)


@settings(deadline=None, max_examples=60)
@given(images=st.integers(1, 3), count=st.integers(4, 30), data=st.data(), seed=st.integers(0, 99))
def test_crossget_is_the_reference(images: int, count: int, data: st.DataObject, seed: int) -> None:
    merge = data.draw(st.integers(0, (count - 2) // 2), "merge")
    size = data.draw(st.sampled_from([None, sizes_of(images, count, seed)]), "size")
    spread = data.draw(st.sampled_from([0.01, 1.0]), "spread")
    keys, importance = drawn((images, 2, count, 5), seed), spread * drawn((images, count), seed + 1)
    source = source_of(images, count, seed)
    same(
        tower.crossget(keys, importance, size, source, merge), reference.crossget(keys, importance, size, source, merge)
    )


def test_crossget_of_more_tokens_than_a_tile() -> None:
    count = 2 * tower.BLOCK + 31
    given = drawn((1, 2, count, 5), 1), drawn((1, count), 2), None, source_of(1, count, 1), 100
    same(tower.crossget(*given), reference.crossget(*given))


@pytest.mark.parametrize("count", [2, 9, 2 * tower.BLOCK + 31])
@pytest.mark.parametrize("biased", [False, True])
def test_received_is_read_off_the_whole_matrix(count: int, biased: bool) -> None:
    q, k = drawn((2, 3, count, SIZE), 0), drawn((2, 3, count, SIZE), 1)
    bias = sizes_of(2, count, 0).log() if biased else None
    found = tower.received(q, k, SCALE, bias)
    torch.testing.assert_close(found, reference.received(q, k, SCALE, bias))
    torch.testing.assert_close(found.sum(1), torch.full((2,), 2.0))
    if not biased:
        found = tower.column_means(q, k, SCALE)
        torch.testing.assert_close(found, reference.column_means(q, k, SCALE))
        torch.testing.assert_close(found.sum(1), torch.ones(2))


MODES = st.sampled_from(["expand", "literal", "floor_add"])


@settings(deadline=None, max_examples=60)
@given(
    images=st.integers(0, 3),
    count=st.integers(1, 40),
    alpha=st.sampled_from([0, 0.075, 0.1, 0.7, 1]),
    mode=MODES,
    sharp=st.floats(0, 3),
    seed=st.integers(0, 99),
)
def test_cls_curve_is_the_reference(images: int, count: int, alpha: float, mode: str, sharp: float, seed: int) -> None:
    x = sharp * drawn((images, 1 + count, 5), seed)
    for a, b in zip(tower.cls_curve(x, alpha, mode), reference.cls_curve(x, alpha, mode), strict=True):
        assert torch.equal(a, b)


def test_where_curves_turn() -> None:
    step = [0.2] * 4 + [0.01] * 16
    line = [float(20 - i) for i in range(20)]
    found = tower.turning_point(torch.tensor([step, line, [0.05] * 20]))
    assert found.tolist() == [5, 10, 20]
    kept = {mode: tower.kept_by_curve(torch.tensor([line]), 0.1, mode).item() for mode in ("expand", "literal")}
    assert kept == {"expand": 11, "literal": 1}  # 1.1 * 10 is no more than 11
    assert tower.kept_by_curve(torch.tensor([line, [0.05] * 20]), 0.1, "floor_add").tolist() == [12, 20]
    assert tower.kept_by_curve(torch.tensor([[0.05] * 20]), 0.1, "literal").tolist() == [20]


def test_padded_keys_hide_what_stands_behind_the_count() -> None:
    found = tower.padded_keys(torch.zeros(3, 4, 2), torch.tensor([0, 2, 3]))
    assert (found == 0).sum(1).tolist() == [1, 3, 4] and found.isneginf().sum() == 4


def test_fakes() -> None:
    keys, source = drawn((2, 3, 12, 4), 0), source_of(2, 12, 0)
    for size in (None, sizes_of(2, 12, 0)):
        torch.library.opcheck(ops.tome, (keys, size, source, 4, True), test_utils=CHECKS)
    into, weight, _, _ = tower.tome(keys, None, source, 4, True)
    checks = (*CHECKS, "test_autograd_registration")
    torch.library.opcheck(ops.join_tokens, (drawn((2, 12, 5), 1).requires_grad_(), into, weight, 4), test_utils=checks)
    importance = drawn((2, 12), 2)
    torch.library.opcheck(ops.crossget, (keys, importance, None, source, 4), test_utils=CHECKS)
    torch.library.opcheck(ops.received, (keys, keys, 0.5, importance), test_utils=CHECKS)
    torch.library.opcheck(ops.column_means, (keys, keys, 0.5), test_utils=CHECKS)
    torch.library.opcheck(ops.cls_curve, (drawn((2, 12, 5), 1), 0.075, "expand"), test_utils=CHECKS)
    torch.library.opcheck(ops.padded_keys, (drawn((2, 4, 5), 1), torch.tensor([1, 3])), test_utils=CHECKS)
    q = drawn((2, 4, 5, SIZE), 3)
    torch.library.opcheck(ops.encoder_attention, (q, q, q, SCALE, sizes_of(2, 5, 0).log()), test_utils=CHECKS)


@pytest.mark.parametrize("count", [2, 9, 700])
def test_flops_are_those_that_torch_counts(count: int) -> None:
    keys, source = drawn((2, 3, count, 4), 0), source_of(2, count, 0)
    with FlopCounterMode(display=False) as counter:
        tower.tome(keys, None, source, (count - 1) // 2, True)
    assert counter.get_total_flops() == counting.FLOPS["tome"](keys)
    with FlopCounterMode(display=False) as counter:
        tower.received(keys, keys, SCALE)
        tower.column_means(keys, keys, SCALE)
    assert counter.get_total_flops() == counting.FLOPS["received"](keys) + counting.FLOPS["column_means"](keys)
    if count >= 4:
        with FlopCounterMode(display=False) as counter:
            tower.crossget(keys, drawn((2, count), 1), None, source, 2)
        assert counter.get_total_flops() == counting.FLOPS["crossget"](keys)
    with FlopCounterMode(display=False) as counter:
        tower.cls_curve(keys[:, 0], 0.1, "expand")
    assert counter.get_total_flops() == counting.FLOPS["cls_curve"](keys[:, 0])
