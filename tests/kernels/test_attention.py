"""The attention kernels against the reference, in every layout, with and without a promise about structure."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import ops
from foveate.kernels import attention as kernels
from foveate.kernels import reference
from foveate.ops import PAD
from tests.kernels.prompts import HEADS, LAYOUTS, SCALE, SIZE, Call, call, in_sequence, plain, real, scattered

STRUCTURED = ("vt:vt", "t:t", "v:vt", "t:vt", "t:vtt")
heads = pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h[0]}on{h[1]}")


def check(arguments: Call, tolerance: float = 1e-5) -> Tensor:
    """Compare kernel and reference on all real queries; padded ones must only be finite."""
    actual = kernels.attention(**arguments)
    expected = reference.attention(**arguments)
    assert actual.shape == expected.shape
    assert actual.dtype == arguments["q"][0].dtype
    assert actual.isfinite().all()
    rows = real(arguments)
    torch.testing.assert_close(actual[rows], expected[rows], rtol=tolerance, atol=tolerance)
    return actual


@heads
@pytest.mark.parametrize("layout", STRUCTURED)
@pytest.mark.parametrize("prefix", [0, 5, 12])
@pytest.mark.parametrize("visual", [0, 1, 11])
def test_attention_under_a_promise_equals_the_reference(
    layout: str, prefix: int, visual: int, heads: tuple[int, int]
) -> None:
    orders = in_sequence(visual, 12, prefix)
    check(call(layout, orders, heads, prefix))
    with mock.patch.object(kernels, "BLOCK", 4), mock.patch.object(kernels, "FEW_QUERIES", 0):
        check(call(layout, orders, heads, prefix))


@heads
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("visual", [0, 1, 11])
@pytest.mark.parametrize("few", [0, 100])
def test_attention_without_a_promise_equals_the_reference(
    layout: str, visual: int, few: int, heads: tuple[int, int]
) -> None:
    orders = scattered(visual, 9, torch.Generator().manual_seed(visual))
    with mock.patch.object(kernels, "BLOCK", 4), mock.patch.object(kernels, "FEW_QUERIES", few):
        check(call(layout, orders, heads, -1))


@pytest.mark.parametrize("layout", ["t:t", "t:vt", "t:vtt"])
@pytest.mark.parametrize("queries", [1, 2, 7, 9, 10])
@pytest.mark.parametrize("prefix", [0, 3, 8, 10])
@pytest.mark.parametrize("few", [0, 8])
def test_fewer_text_queries_than_keys_are_the_last_of_the_prompt(
    layout: str, queries: int, prefix: int, few: int
) -> None:
    orders = in_sequence(6, 10, prefix)
    with mock.patch.object(kernels, "BLOCK", 3), mock.patch.object(kernels, "FEW_QUERIES", few):
        check(call(layout, orders, (4, 2), prefix, queries=queries))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_prompt_in_any_layout_equals_the_reference(data: st.DataObject) -> None:
    draw = data.draw
    visual, text = draw(st.integers(0, 20), "visual"), draw(st.integers(1, 20), "text")
    layout, counts = draw(st.sampled_from(LAYOUTS)), draw(st.sampled_from(HEADS))
    promised = layout != "s:s" and draw(st.booleans(), "promised")
    prefix = draw(st.integers(0, text), "prefix") if promised else -1
    seed = draw(st.integers(0, 99), "seed")
    orders = (
        in_sequence(visual, text, prefix)
        if promised
        else scattered(visual, text, torch.Generator().manual_seed(seed), draw(st.integers(1, 4), "batch"))
    )
    queries = draw(st.none() | st.integers(1, text), "queries") if layout[0] == "t" else None
    block, few = draw(st.sampled_from([1, 3, 256]), "block"), draw(st.sampled_from([0, 8]), "few")
    with mock.patch.object(kernels, "BLOCK", block), mock.patch.object(kernels, "FEW_QUERIES", few):
        check(call(layout, orders, counts, prefix, queries=queries, seed=seed))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_promise_changes_no_value(layout: str) -> None:
    arguments = call(layout, in_sequence(9, 12, 4), (4, 2), 4)
    promised = kernels.attention(**arguments)
    torch.testing.assert_close(promised, kernels.attention(**{**arguments, "prefix": -1}), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", [-1, 3])
def test_attention_in_bfloat16_is_near_the_reference(layout: str, prefix: int) -> None:
    check(call(layout, in_sequence(9, 12, 3), (4, 2), prefix, dtype=torch.bfloat16), tolerance=2e-2)


@pytest.mark.parametrize("layout", ["vt:vt", "t:vt", "v:vt"])
def test_blocks_longer_than_the_real_block_size(layout: str) -> None:
    check(call(layout, in_sequence(300, 260, 130, batch=1), (2, 1), 130))
    check(call(layout, scattered(300, 260, torch.Generator().manual_seed(0), 2), (2, 1), -1))


@pytest.mark.parametrize("layout", ["t:t", "t:vt", "v:vt", "vt:vt"])
@pytest.mark.parametrize("prefix", [-1, 2])
def test_no_mask_covers_more_than_one_block_of_queries(layout: str, prefix: int) -> None:
    masks: list[int] = []
    original = kernels.scaled_dot_product_attention

    def spy(*tensors: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
        if attn_mask is not None:
            masks.append(attn_mask.shape[-2])
        return original(*tensors, attn_mask=attn_mask, **options)

    arguments = call(layout, in_sequence(30, 40, 2), (2, 2), prefix, queries=35 if layout[0] == "t" else None)
    with mock.patch.multiple(kernels, BLOCK=4, scaled_dot_product_attention=spy):
        kernels.attention(**arguments)
    assert all(rows <= 4 for rows in masks)
    assert bool(masks) == (prefix < 0 or layout != "vt:vt")


@pytest.mark.parametrize("few", [0, 8])
def test_rows_that_are_padding_from_end_to_end_are_finite(few: int) -> None:
    orders = in_sequence(3, 4, 1)
    orders = {name: order.clone() for name, order in orders.items()}
    for order in orders.values():
        order[0] = PAD
    with mock.patch.object(kernels, "FEW_QUERIES", few):
        for layout in LAYOUTS:
            check(call(layout, orders, (4, 2), -1))


@pytest.mark.parametrize("layout", ["t:t", "t:vt", "v:vt", "vt:vt", "s:s"])
@pytest.mark.parametrize("prefix", [-1, 0])
@pytest.mark.parametrize("few", [0, 8])
def test_no_query_at_all_gives_an_empty_result(layout: str, prefix: int, few: int) -> None:
    orders = in_sequence(2, 3, 0)
    arguments = call(layout, orders, (4, 2), prefix)
    for name, dim in (("q", 2), ("q_order", 1)):
        arguments[name] = [x.narrow(dim, 0, 0) for x in arguments[name]]
    if layout == "vt:vt":
        return  # a whole layer asks with every key's token
    with mock.patch.object(kernels, "FEW_QUERIES", few):
        assert kernels.attention(**arguments).shape == (2, 0, 4, SIZE)


def test_padded_keys_are_never_seen() -> None:
    orders = scattered(6, 8, torch.Generator().manual_seed(1))
    arguments = call("vt:vt", orders, (4, 2), -1)
    expected = kernels.attention(**arguments)
    for name in ("k", "v"):
        arguments[name] = [
            x.masked_fill((order == PAD)[:, None, :, None], 1e4)
            for x, order in zip(arguments[name], arguments["k_order"], strict=True)
        ]
    rows = real(arguments)
    assert (~rows).any()
    torch.testing.assert_close(kernels.attention(**arguments)[rows], expected[rows])


def test_later_keys_are_never_seen() -> None:
    arguments = call("vt:vt", in_sequence(6, 8, 3), (4, 2), 3)
    expected = kernels.attention(**arguments)
    arguments["v"][1][:, :, -1] += 1e4
    actual = kernels.attention(**arguments)
    torch.testing.assert_close(actual[:, :-1], expected[:, :-1])
    assert not torch.allclose(actual[:, -1], expected[:, -1])


@pytest.mark.parametrize("tokens", [1, 17])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_encoder_attention_equals_the_reference(tokens: int, batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, 2, tokens, SIZE, generator=generator) for _ in range(3))
    actual = kernels.encoder_attention(q, k, v, SCALE)
    torch.testing.assert_close(actual, reference.encoder_attention(q, k, v, SCALE), rtol=1e-5, atol=1e-5)
    assert actual.is_contiguous()


@heads
@pytest.mark.parametrize("rows", [0, 1, 3])
@pytest.mark.parametrize("visual", [0, 1, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_row_equals_the_whole_softmax(rows: int, visual: int, padded: bool, heads: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    orders = scattered(visual, 7, generator) if padded else in_sequence(visual, 7, 3)
    arguments = call("t:vt", orders, heads, -1)
    q, order = arguments["q"][0][:, :, 7 - rows :], arguments["q_order"][0][:, 7 - rows :]
    row = (q, arguments["k"], order, arguments["k_order"], SCALE)
    actual = kernels.attention_row(*row)
    assert actual.dtype == torch.float32
    assert actual.isfinite().all()
    torch.testing.assert_close(actual, reference.attention_row(*row), rtol=1e-5, atol=1e-6)


def test_attention_row_is_fp32_for_bfloat16_inputs() -> None:
    arguments = call("t:vt", in_sequence(9, 7, 3), (4, 2), -1, queries=1, dtype=torch.bfloat16)
    row = (arguments["q"][0], arguments["k"], arguments["q_order"][0], arguments["k_order"], SCALE)
    actual = kernels.attention_row(*row)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, reference.attention_row(*row), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_ops_give_what_their_fakes_promise(layout: str) -> None:
    checks = ("test_schema", "test_faketensor")
    arguments = call(layout, in_sequence(9, 12, 4), (4, 2), 4)
    torch.library.opcheck(ops.attention, plain(arguments), test_utils=checks)
    row = (arguments["q"][0], arguments["k"], arguments["q_order"][0], arguments["k_order"], SCALE)
    torch.library.opcheck(ops.attention_row, row, test_utils=checks)
    q = torch.randn(2, 4, 5, SIZE)
    torch.library.opcheck(ops.encoder_attention, (q, q, q, SCALE), test_utils=checks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("prefix", [-1, 4])
def test_attention_results_are_contiguous_as_their_fakes_are(layout: str, prefix: int) -> None:
    arguments = call(layout, in_sequence(9, 12, 4), (4, 2), prefix)
    for few in (0, 100):
        with mock.patch.object(kernels, "FEW_QUERIES", few):
            assert kernels.attention(**arguments).is_contiguous()


def test_on_meta_the_ops_give_shapes_only() -> None:
    arguments = call("vt:vt", in_sequence(9, 12, 4), (4, 2), 4)
    for name in ("q", "k", "v", "q_order", "k_order"):
        arguments[name] = [x.to("meta") for x in arguments[name]]
    result = ops.attention(*plain(arguments))
    assert result.is_meta
    assert result.shape == (2, 21, 4, SIZE)
