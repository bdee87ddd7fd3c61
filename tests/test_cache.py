"""The cache: growth in place, beams, sizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.cache import GROWTH, Growing, VisualTextCache
from foveate.errors import InputError

BATCH, HEADS, SIZE = 3, 2, 4


def numbered(tokens: int, dim: int = 2, start: int = 0) -> Tensor:
    """A tensor [3, 2, tokens, 4] (or [3, tokens]) in which every token differs."""
    shape = [BATCH, HEADS, 1, SIZE] if dim == 2 else [BATCH, 1]
    base = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape) * 1000
    return torch.cat([base + start + t for t in range(tokens)], dim) if tokens else base.narrow(dim, 0, 0)


@settings(deadline=None, max_examples=40)
@given(
    pieces=st.lists(st.integers(0, 3) | st.integers(GROWTH - 1, GROWTH + 1), min_size=1, max_size=6),
    dim=st.sampled_from([1, 2]),
    asked=st.sets(st.integers(0, 5)),
)
def test_growing_holds_what_was_appended(pieces: list[int], dim: int, asked: set[int]) -> None:
    parts, start = [], 0
    for count in pieces:
        parts.append(numbered(count, dim, start))
        start += count
    growing = Growing(parts[0], dim, empty=-1)
    for place, part in enumerate(parts[1:]):
        if place in asked:
            growing.whole()
        growing.append(part)
    assert growing.length == start
    written, free = growing.whole().tensor_split([start], dim)
    assert torch.equal(growing.view(), torch.cat(parts, dim))
    assert torch.equal(written, growing.view())
    assert free.shape[dim] == growing.buffer.shape[dim] - start
    assert bool((free == -1).all())


def test_appending_copies_only_when_the_room_is_full() -> None:
    growing = Growing(numbered(5), 2)
    pointers = set()
    for step in range(GROWTH):
        pointers.add(growing.buffer.data_ptr())
        growing.append(numbered(1, start=5 + step))
    assert len(pointers) == 1
    growing.append(numbered(1, start=5 + GROWTH))
    assert growing.buffer.data_ptr() not in pointers
    assert torch.equal(growing.view(), numbered(6 + GROWTH))


def test_growing_does_not_keep_what_it_was_given() -> None:
    start = numbered(2)
    growing = Growing(start, 2)
    start.zero_()
    assert torch.equal(growing.view(), numbered(2))


@pytest.mark.parametrize("rows", [[2, 0, 0], [1], [0, 1, 2, 2, 1]])
def test_growing_goes_on_after_rows_were_chosen(rows: list[int]) -> None:
    growing = Growing(numbered(3), 2)
    growing.select_rows(torch.tensor(rows))
    growing.append(numbered(2, start=3)[rows])
    assert torch.equal(growing.view(), numbered(5)[rows])


def filled(layers: int = 2) -> VisualTextCache:
    """Layer 0 sees 4 visual tokens, later layers see none; 3 text tokens."""
    kv = [[numbered(4), numbered(4) + 0.5, numbered(3), numbered(3) + 0.5]]
    kv += [[None, None, numbered(3) + layer, numbered(3) - layer] for layer in range(1, layers)]
    cache = VisualTextCache()
    orders = {"visual_order": torch.arange(BATCH * 4).view(BATCH, 4)}
    position = torch.tensor([[7], [8], [9]])
    cache.fill(kv, orders, torch.arange(3).repeat(BATCH, 1), prefix=1, seen=7, position=position)
    return cache


def step(tokens: int = 1) -> tuple[list[list[Tensor | None]], Tensor]:
    kv = [[None, None, numbered(tokens, start=50 + layer), numbered(tokens, start=70 + layer)] for layer in range(2)]
    return kv, torch.arange(7, 7 + tokens).repeat(BATCH, 1)


def test_a_step_is_appended_to_text_alone() -> None:
    cache = filled()
    before = {name: value.clone() for name, value in cache.fixed.items()}
    cache.extend(*step(2))
    inputs = cache.inputs()
    assert all(torch.equal(cache.fixed[name], value) for name, value in before.items())
    assert torch.equal(inputs["past_k_1"], torch.cat([numbered(3) + 1, numbered(2, start=51)], 2))
    assert torch.equal(inputs["past_v_0"], torch.cat([numbered(3) + 0.5, numbered(2, start=70)], 2))
    assert inputs["past_order"][0].tolist() == [0, 1, 2, 7, 8]
    assert cache.next_position is not None
    assert cache.next_position.tolist() == [[9], [10], [11]]
    assert cache.get_seq_length() == len(cache) == 9
    assert inputs["prefix"] == 1


def test_a_blind_layer_has_no_visual_part() -> None:
    assert {name for name in filled().inputs() if name.startswith("visual")} == {
        "visual_k_0",
        "visual_v_0",
        "visual_order",
    }


def test_nbytes_counts_keys_and_values_without_room_for_growth() -> None:
    cache = filled()
    token = BATCH * HEADS * SIZE * 4
    assert cache.nbytes() == token * (2 * 4 + 2 * 2 * 3)
    cache.extend(*step(2))
    assert cache.nbytes() == token * (2 * 4 + 2 * 2 * 5)


@pytest.mark.parametrize("rows", [[2, 0, 0], [1, 1, 1]])
def test_reorder_moves_every_part_of_a_row(rows: list[int]) -> None:
    cache, plain = filled(), filled()
    cache.extend(*step())
    plain.extend(*step())
    cache.reorder_cache(torch.tensor(rows))
    assert cache.next_position is not None and plain.next_position is not None
    assert torch.equal(cache.next_position, plain.next_position[rows])
    for name, value in plain.inputs().items():
        if isinstance(value, Tensor):
            assert torch.equal(cache.inputs()[name], value[rows]), name
    cache.extend(*step())
    assert cache.inputs()["past_k_0"].shape[2] == 5


def test_reorder_does_not_touch_tensors_that_were_handed_out() -> None:
    cache = filled()
    handed = cache.inputs()
    kept = {name: value.clone() for name, value in handed.items() if isinstance(value, Tensor)}
    cache.reorder_cache(torch.tensor([1, 1, 1]))
    assert all(torch.equal(handed[name], value) for name, value in kept.items())


def test_an_empty_cache_has_seen_nothing() -> None:
    cache = VisualTextCache()
    assert len(cache) == cache.get_seq_length() == cache.nbytes() == 0


def test_assisted_decoding_is_refused() -> None:
    with pytest.raises(InputError, match="assisted decoding"):
        VisualTextCache().activate_past_recording()
