"""Every form of neighbour attention against the reference, which knows orders and coordinates only."""

from __future__ import annotations

from itertools import product
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import ops
from foveate.kernels.neighbor import blocks, dispatch, reference, tiles
from foveate.machine import thread_count
from foveate.neighborhood import METRICS, layouts
from foveate.ops import PAD
from tests.kernels.neighbor.cases import Case, Prompt, case

ONE: list[Prompt] = [[(0, 6, 7)]]
TEXT: list[Prompt] = [[(5, 6, 7)]]
RAGGED: list[Prompt] = [[(3, 4, 5), (0, 1, 6), (2, 7, 2)], [(4, 3, 3)], [(1, 5, 8)]]
PROMPTS = {"one": ONE, "text": TEXT, "ragged": RAGGED}
HEADS = [(2, 2), (4, 2), (3, 1)]
SHAPES = [(1, 1), (2, 4), (4, 2), (1, 8), (16, 1), (8, 8)]


def check_tiles(x: Case, rows: int, columns: int, tolerance: float = 1e-5) -> None:
    """Fused on one thread, by products on several."""
    call, grids = x.described()
    assert grids is not None
    for threads in (1, 2):
        with thread_count(threads):
            x.check(tiles.attend(x.inputs(), call, grids, layouts.tiles(call, grids, rows, columns)), tolerance)


def by_blocks(x: Case, size: int) -> Tensor:
    call, grids = x.described()
    return blocks.attend(x.inputs(), call, grids, layouts.blocks(call, grids, size))


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("radius", [0, 1, 2, 5, 50])
def test_every_form_equals_the_reference(radius: int, metric: str, causal: bool, prompts: list[Prompt]) -> None:
    x = case(prompts, radius, metric, causal, heads=(4, 2))
    for rows, columns in SHAPES:
        check_tiles(x, rows, columns)
    for size in (1, 5, 64):
        x.check(by_blocks(x, size))


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_key_heads_may_be_shared_and_memory_laid_out_either_way(
    heads: tuple[int, int], transposed: bool, causal: bool
) -> None:
    x = case(RAGGED, 2, causal=causal, heads=heads, transposed=transposed)
    check_tiles(x, 2, 4)
    x.check(by_blocks(x, 16))
    x.check(ops.neighbor_attention(**x.arguments))


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_heads_may_be_some_of_more(heads: tuple[int, int]) -> None:
    x = case(RAGGED, 2, heads=heads)
    # In memory a token's other heads then lie between its own and the next token's.
    q, *streams = (x.arguments["q"], *x.arguments["k"], *x.arguments["v"])
    q, *streams = (
        torch.cat([y, y], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, : y.shape[1]] for y in (q, *streams)
    )
    x = x.changed(q=q, k=streams[:2], v=streams[2:])
    check_tiles(x, 2, 4)
    x.check(ops.neighbor_attention(**x.arguments))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_prompt_equals_the_reference(data: st.DataObject) -> None:
    draw = data.draw
    image = st.tuples(st.integers(0, 4), st.integers(1, 6), st.integers(1, 6))
    prompts = draw(st.lists(st.lists(image, max_size=3), min_size=1, max_size=3), "prompts")
    x = case(
        prompts,
        draw(st.integers(0, 7), "radius"),
        draw(st.sampled_from(METRICS), "metric"),
        draw(st.booleans(), "causal"),
        draw(st.sampled_from(HEADS), "heads"),
        seed=draw(st.integers(0, 99), "seed"),
        transposed=draw(st.booleans(), "transposed"),
    )
    x.check(ops.neighbor_attention(**x.arguments))
    if x.described()[1] is not None:
        check_tiles(x, *draw(st.sampled_from(SHAPES), "shape"))
        x.check(by_blocks(x, draw(st.integers(1, 20), "block")))


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_tokens_that_were_kept_see_what_is_left_of_their_neighbours(data: st.DataObject) -> None:
    draw = data.draw
    x = case(TEXT, draw(st.integers(0, 4)), draw(st.sampled_from(METRICS)), draw(st.booleans()), heads=(4, 2))
    kept = draw(st.lists(st.integers(0, 41), min_size=1, max_size=41, unique=True), "kept")
    pruned = x.keeping(torch.tensor(sorted(kept)))
    assert pruned.described()[1] is None
    pruned.check(ops.neighbor_attention(**pruned.arguments))
    pruned.check(by_blocks(pruned, draw(st.integers(1, 20), "block")))


def test_kept_tokens_of_a_ragged_batch_may_be_padded() -> None:
    x = case(RAGGED, 2).keeping(torch.arange(0, 40, 2))
    order = x.arguments["q_order"].clone()
    order[:, -3:] = PAD
    x = x.changed(q_order=order, k_order=[order, *x.arguments["k_order"][1:]])
    x.check(ops.neighbor_attention(**x.arguments))


def test_a_void_promise_is_not_believed() -> None:
    x = case(TEXT, 2)
    grids = x.arguments["grids"].clone()
    for wrong in (grids[:0], grids + torch.tensor([0, 0, 1, 0, 0, 0])):
        void = x.changed(grids=wrong)
        assert void.described()[1] is None
        void.check(ops.neighbor_attention(**void.arguments))


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_a_promise_changes_no_value(prompts: list[Prompt]) -> None:
    x = case(prompts, 2)
    promised = ops.neighbor_attention(**x.arguments)
    x = x.changed(grids=x.arguments["grids"][:0])
    torch.testing.assert_close(promised[x.real], ops.neighbor_attention(**x.arguments)[x.real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_is_near_the_reference(dtype: torch.dtype, causal: bool) -> None:
    x = case(RAGGED, 2, causal=causal, dtype=dtype)
    check_tiles(x, 4, 4, 2e-2)
    x.check(by_blocks(x, 16), 2e-2)


def test_the_real_chunks_and_blocks_leave_no_token_out() -> None:
    x = case([[(3, 20, 30)]], 2, heads=(8, 8), size=64)
    call, grids = x.described()
    assert grids is not None
    cut = layouts.tiles(call, grids, 2, 8)
    assert cut.count > 2 * cut.step
    check_tiles(x, 2, 8)
    x.check(by_blocks(x, 64))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("causal", [True, False])
def test_who_sees_whom_pair_by_pair(metric: str, causal: bool) -> None:
    x = case([[(0, 3, 4), (1, 2, 3)], [(2, 3, 3)]], 1, metric, causal)
    order, coords = x.arguments["q_order"], x.arguments["coords"]
    seen = reference.visible(order, coords, order, coords, 2, metric, causal)
    for b, i, j in product(range(2), range(order.shape[1]), range(order.shape[1])):
        (image, row, column), (other, key_row, key_column) = coords[b, i].tolist(), coords[b, j].tolist()
        own, key = order[b, i].item(), order[b, j].item()
        distance = {
            "chebyshev": max(abs(row - key_row), abs(column - key_column)),
            "euclidean": ((row - key_row) ** 2 + (column - key_column) ** 2) ** 0.5,
            "raster": abs(own - key),
        }[metric]
        expected = image == other and distance <= 2 and key != PAD and (key <= own or not causal)
        assert seen[b, i, j] == expected, (b, i, j)


def test_the_reference_without_a_window_is_causal_attention() -> None:
    x = case(TEXT, 99)
    a = x.arguments
    k, v = (torch.cat([y[1], y[0]], 2) for y in (a["k"], a["v"]))
    mask = torch.ones(42, 47, dtype=torch.bool).tril(5)
    expected = torch.nn.functional.scaled_dot_product_attention(a["q"], k, v, mask, scale=a["scale"]).transpose(1, 2)
    torch.testing.assert_close(x.expected(), expected, rtol=1e-5, atol=1e-5)


def test_a_single_row_is_cut_like_a_single_column() -> None:
    x = case([[(3, 1, 300)]], 200, causal=False)
    call, grids = x.described()
    assert {block.stop - block.start for block in layouts.blocks(call, grids, 64)} == {64, 300 % 64}
    x.check(by_blocks(x, 64))
    check_tiles(x, 64, 1)


@pytest.mark.parametrize("promised", [True, False])
def test_no_mask_covers_more_than_a_block_of_queries(promised: bool) -> None:
    x = case([[(3, 40, 30)]], 2)
    x = x if promised else x.keeping(torch.arange(1000))
    spy = mock.Mock(wraps=torch.nn.functional.scaled_dot_product_attention)
    with mock.patch.object(blocks, "scaled_dot_product_attention", spy):
        x.check(by_blocks(x, 64))
    masks = [options["attn_mask"].shape[-2:] for _, options in spy.call_args_list]
    assert len(masks) >= 16
    assert max(rows for rows, _ in masks) <= 64
    assert max(keys for _, keys in masks) == (3 + 4 * 30 if promised else 1003)


def test_the_tables_of_tiles_grow_with_the_tokens_only() -> None:
    sizes = []
    for side in (16, 32, 64):
        call, grids = case([[(0, side, side)]], 2).described()
        assert grids is not None
        made = tiles._tables(call, grids, layouts.tiles(call, grids, 2, 8), torch.device("cpu"))
        sizes.append(sum(x.numel() for x in vars(made).values()) / side**2)
    assert sizes == sorted(sizes, reverse=True), "elements a token"


def test_layers_share_tables() -> None:
    tiles._tables.cache_clear()
    first, second = case(TEXT, 2, seed=1), case(TEXT, 2, seed=2)
    for x in (first, second):
        check_tiles(x, 2, 4)
    assert tiles._tables.cache_info().misses == 1
    assert tiles._tables.cache_info().hits == 3
    assert tiles._tables.cache_info().maxsize is not None


@pytest.mark.parametrize("radius", [1, 4])
def test_what_is_kept_between_calls_serves_every_mode(radius: int) -> None:
    x = case([[(3, 6, 8)]], radius, seed=3)
    with torch.inference_mode(), torch.device("meta"):
        check_tiles(x, 3, 4)
        x.check(by_blocks(x, 24))
    check_tiles(x, 3, 4)
    x.check(by_blocks(x, 24))
    grown = x.changed(q=x.arguments["q"].clone().requires_grad_())
    grown.check(ops.neighbor_attention(**grown.arguments))


def test_no_token_gives_an_empty_result() -> None:
    x = case(ONE, 2)
    empty = x.keeping(torch.arange(0))
    assert ops.neighbor_attention(**empty.arguments).shape == (1, 0, 2, 8)
    assert dispatch.neighbor_attention(**empty.arguments).shape == (1, 0, 2, 8)
