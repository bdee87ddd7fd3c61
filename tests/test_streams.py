"""Prompts taken apart into streams, and put together again."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate import streams as taken_apart
from foveate.errors import InputError
from foveate.ir.layout import NOWHERE
from foveate.ir.program import ModelInfo
from foveate.models.registry import FAMILIES
from foveate.ops import PAD
from foveate.streams import Stream, Streams

IMAGE, GRID = 99, (1, 3)
TOKENS = GRID[0] * GRID[1]

INFO = ModelInfo(
    family="llava",
    layers=2,
    heads=2,
    kv_heads=2,
    head_dim=4,
    hidden_size=8,
    intermediate_size=8,
    image_token_id=IMAGE,
    grid=GRID,
    image_size=(3, 8, 24),
    paths={},
    roles={},
    config={},
)

Row = list[int]


def arrange(
    info: ModelInfo,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    images: int,
    asked: Tensor | None = None,
) -> Streams:
    """Prompts whose images are whole."""
    out = {"out": torch.zeros(images, TOKENS, 1)} if images else None
    return seen(info, input_ids, attention_mask, position_ids, out, asked)


def seen(
    info: ModelInfo,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    out: dict[str, Tensor] | None,
    asked: Tensor | None = None,
) -> Streams:
    """Prompts for whose images the vision graph gave `out`."""
    taken_apart.check_prompts(input_ids, attention_mask, position_ids)
    image = info.visual(input_ids)
    given = {} if out is None else {"pixel_values": torch.empty(len(out["out"]), 0)}
    layout = FAMILIES["llava"].layout(info, given, input_ids[image], out)
    mask, positions = taken_apart.shorten(input_ids, image, layout, attention_mask, position_ids)
    return taken_apart.arrange(input_ids, image, layout, mask, positions, asked)


def image_or_text(draw: st.DrawFn) -> Row:
    """A prompt of 0 to 3 images with text of any length, also none, before, between and after them."""
    row: Row = []
    for _ in range(draw(st.integers(0, 3))):
        row += draw(st.lists(st.integers(1, 50), max_size=4)) + [IMAGE] * TOKENS
    row += draw(st.lists(st.integers(1, 50), max_size=4))
    return row or [7]


prompts = st.lists(st.composite(image_or_text)(), min_size=1, max_size=4)


def padded(rows: list[Row], side: str) -> tuple[Tensor, Tensor]:
    """Ids and attention mask [B, longest]."""
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[number, start : start + len(row)] = torch.tensor(row)
        mask[number, start : start + len(row)] = 1
    return ids, mask


def images_in(rows: list[Row]) -> int:
    return sum(row.count(IMAGE) for row in rows) // TOKENS


def rebuilt(streams: Streams, ids: Tensor, row: int) -> Row:
    """The prompt of a row, from its two streams alone."""
    found: dict[int, int] = {}
    for stream in (streams.visual, streams.text):
        for column in range(stream.order.shape[1]):
            place = int(stream.order[row, column])
            if place != PAD:
                assert place not in found, "one token stands in the streams twice"
                assert place == int(stream.index[row, column])
                found[place] = int(ids[row, place])
    return [found[place] for place in sorted(found)]


def promise_holds(streams: Streams) -> bool:
    """What `foveate.ops.attention` says of a prefix that is not negative, checked on the orders."""
    visual, text = streams.visual.order, streams.text.order
    if bool((visual == PAD).any()) or bool((text == PAD).any()):
        return False
    for stream in (visual, text):
        if bool((stream.diff(dim=1) <= 0).any()):
            return False
    if visual.shape[1] == 0:
        return streams.prefix == text.shape[1]
    before = (text < visual[:, :1]).sum(1)
    after = (text > visual[:, -1:]).sum(1)
    together = bool((before + after == text.shape[1]).all())
    return together and bool((before == before[0]).all()) and int(before[0]) == streams.prefix


@settings(deadline=None, max_examples=80)
@given(rows=prompts, side=st.sampled_from(["left", "right"]))
def test_streams_hold_every_token_of_the_prompt_once(rows: list[Row], side: str) -> None:
    ids, mask = padded(rows, side)
    streams = arrange(INFO, ids, mask, None, images_in(rows))
    for number, row in enumerate(rows):
        assert rebuilt(streams, ids, number) == row
        visual = streams.visual.order[number]
        real = int((visual != PAD).sum())
        assert real == row.count(IMAGE) - (row[-1] == IMAGE)
        assert bool((visual[:real] != PAD).all()), "visual tokens stand at the left"
        text = streams.text.order[number]
        count = int((text != PAD).sum())
        assert bool((text[text.shape[0] - count :] != PAD).all()), "text tokens stand at the right"
        start = ids.shape[1] - len(row) if side == "left" else 0
        assert int(text[-1]) == start + len(row) - 1, "the last text column is the last token"
        assert int(streams.next_position[number]) == len(row)
    for stream in (streams.visual, streams.text):
        assert bool((stream.index >= 0).all()) and bool((stream.index < ids.shape[1]).all())
        assert bool((stream.order != PAD).any(dim=0).all()), "no column is padding in every row"


@settings(deadline=None, max_examples=80)
@given(rows=prompts, side=st.sampled_from(["left", "right"]))
def test_each_visual_token_knows_its_embedding(rows: list[Row], side: str) -> None:
    ids, mask = padded(rows, side)
    streams = arrange(INFO, ids, mask, None, images_in(rows))
    assert torch.equal(streams.image, ids == IMAGE)
    assert streams.feature[streams.image].tolist() == list(range(images_in(rows) * TOKENS))
    assert bool((streams.feature >= 0).all())


@settings(deadline=None, max_examples=80)
@given(rows=prompts, side=st.sampled_from(["left", "right"]), same=st.booleans())
def test_the_prefix_is_negative_exactly_when_the_promise_would_not_hold(rows: list[Row], side: str, same: bool) -> None:
    rows = [rows[0]] * len(rows) if same else rows
    ids, mask = padded(rows, side)
    streams = arrange(INFO, ids, mask, None, images_in(rows))
    if streams.prefix >= 0:
        assert promise_holds(streams)
    else:
        before = int((streams.text.order[0] < streams.visual.order[0, :1]).sum()) if same else 0
        candidates = range(streams.text.order.shape[1] + 1)
        assert not any(promise_holds(dataclasses.replace(streams, prefix=p)) for p in candidates), before


@settings(deadline=None, max_examples=40)
@given(rows=prompts, side=st.sampled_from(["left", "right"]))
def test_positions_count_real_tokens(rows: list[Row], side: str) -> None:
    ids, mask = padded(rows, side)
    streams = arrange(INFO, ids, mask, None, images_in(rows))
    for stream in (streams.visual, streams.text):
        for number, row in enumerate(rows):
            start = ids.shape[1] - len(row) if side == "left" else 0
            valid = stream.order[number] != PAD
            assert torch.equal(stream.position_ids[number][valid], stream.order[number][valid] - start)


def row_of(stream: Stream, row: int) -> tuple[Row, Row]:
    valid = stream.order[row] != PAD
    return stream.order[row][valid].tolist(), stream.position_ids[row][valid].tolist()


def test_a_prompt_that_ends_in_an_image_keeps_its_last_visual_token_with_the_text() -> None:
    rows = [[5, 6, IMAGE, IMAGE, IMAGE]]
    streams = arrange(INFO, *padded(rows, "left"), None, 1)
    assert row_of(streams.visual, 0) == ([2, 3], [2, 3])
    assert row_of(streams.text, 0) == ([0, 1, 4], [0, 1, 4])
    assert streams.prefix == 2
    assert streams.next_position.tolist() == [[5]]


def test_a_prompt_that_is_one_image_alone() -> None:
    streams = arrange(INFO, *padded([[IMAGE] * 3], "left"), None, 1)
    assert row_of(streams.visual, 0)[0] == [0, 1]
    assert row_of(streams.text, 0)[0] == [2]
    assert streams.prefix == 0


def test_rows_whose_images_stand_elsewhere_promise_nothing() -> None:
    image = [IMAGE] * 3
    assert arrange(INFO, *padded([[1, *image, 2, 3], [1, 2, *image, 3]], "left"), None, 2).prefix == -1
    assert arrange(INFO, *padded([[1, *image, 2, *image, 3]], "left"), None, 2).prefix == -1
    assert arrange(INFO, *padded([[1, *image, *image, 3]], "left"), None, 2).prefix == 1
    assert arrange(INFO, *padded([[1, 2, 3]], "left"), None, 0).prefix == 3
    assert arrange(INFO, *padded([[1, 2, 3], [1, 2]], "left"), None, 0).prefix == -1


def test_a_hole_in_the_attention_mask_is_padding() -> None:
    ids, mask = padded([[1, 2, *[IMAGE] * 3, 3, 4]], "left")
    mask[0, 1] = mask[0, 3] = 0
    streams = arrange(INFO, ids, mask, None, 1)
    assert row_of(streams.visual, 0)[0] == [2, 4]
    assert row_of(streams.text, 0) == ([0, 5, 6], [0, 3, 4])
    assert streams.prefix == 1 and promise_holds(streams)
    assert streams.feature.gather(1, streams.visual.index).tolist() == [[0, 2]]


def test_given_position_ids_are_kept_and_may_have_one_row() -> None:
    ids, mask = padded([[1, *[IMAGE] * 3, 2]] * 2, "left")
    positions = torch.tensor([[4, 5, 6, 7, 9]])
    streams = arrange(INFO, ids, mask, positions, 2)
    assert streams.visual.position_ids.tolist() == [[5, 6, 7]] * 2
    assert streams.text.position_ids.tolist() == [[4, 9]] * 2
    assert streams.next_position.tolist() == [[10]] * 2


def test_without_an_attention_mask_every_token_is_real() -> None:
    ids, mask = padded([[0, 1, *[IMAGE] * 3, 0]], "left")
    given_, none = arrange(INFO, ids, mask, None, 1), arrange(INFO, ids, None, None, 1)
    assert torch.equal(given_.text.order, none.text.order)
    assert given_.prefix == none.prefix == 2


@settings(deadline=None, max_examples=80)
@given(rows=prompts, side=st.sampled_from(["left", "right"]), data=st.data())
def test_images_that_became_shorter(rows: list[Row], side: str, data: st.DataObject) -> None:
    """As if the prompts had been written with fewer image tokens."""
    ids, mask = padded(rows, side)
    counts = data.draw(st.lists(st.integers(0, TOKENS), min_size=images_in(rows), max_size=images_in(rows)))
    if not counts or any(row == [IMAGE] * len(row) for row in rows):
        return
    source = torch.tensor([data.draw(st.permutations(range(TOKENS))) for _ in counts])
    out = {"out": torch.zeros(len(counts), TOKENS, 1), "source": source, "count": torch.tensor(counts)}
    streams = seen(INFO, ids, mask, (mask.cumsum(1) - 1).clamp(min=0), out)
    own = seen(INFO, ids, mask, None, out)
    number, shorter = 0, []
    for row in rows:
        tokens, at = [], 0
        while at < len(row):
            if row[at] == IMAGE:
                tokens += [(number, place) for place in range(counts[number])]
                number, at = number + 1, at + TOKENS
            else:
                tokens, at = [*tokens, row[at]], at + 1
        shorter.append(tokens)
    for row, tokens in enumerate(shorter):
        found: dict[int, Any] = {}
        for stream in (streams.visual, streams.text):
            for order, index, position in zip(stream.order[row], stream.index[row], stream.position_ids[row]):
                if order != PAD:
                    feature = divmod(int(streams.feature[row, index]), TOKENS)
                    found[int(position)] = feature if ids[row, index] == IMAGE else int(ids[row, index])
        assert [found[place] for place in range(len(tokens))] == tokens
        assert int(streams.next_position[row]) == len(tokens) == int(own.next_position[row])
    valid = streams.visual.order != PAD
    assert torch.equal(streams.visual.position_ids, own.visual.position_ids)
    places = streams.feature.gather(1, streams.visual.index)[valid]
    assert torch.equal(streams.coords[valid][:, 2], source.flatten()[places] % TOKENS)
    assert torch.equal(streams.coords[valid][:, 0], places // TOKENS)
    origin = streams.origin.gather(1, streams.visual.order.masked_fill(~valid, 0))[valid]
    assert bool((ids.flatten()[origin + ids.shape[1] * valid.nonzero()[:, 0]] == IMAGE).all())
    for row, tokens in enumerate(shorter):
        orders = sorted({*streams.visual.order[row].tolist(), *streams.text.order[row].tolist()} - {PAD})
        assert orders == list(range(ids.shape[1] - len(tokens), ids.shape[1])), "a window would count what is gone"
    assert streams.prefix == -1 or promise_holds(streams)
    assert len(streams.grids) == 0


def test_a_token_without_a_place_is_far_from_all_others() -> None:
    ids, mask = padded([[1, *[IMAGE] * 3, 2]], "left")
    streams = seen(INFO, ids, mask, None, {"out": torch.zeros(1, 2, 1), "source": torch.tensor([[-1, 2]])})
    assert streams.coords.tolist() == [[[0, NOWHERE, NOWHERE], [0, 0, 2]]]
    assert streams.origin.gather(1, streams.visual.order).tolist() == [[PAD, 3]]
    assert streams.order.tolist() == [[1, 2, 3, 3, 4]]


PROMPT = [1, *[IMAGE] * 3, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0}, r"prompts hold 6 image tokens, and 0 images of 3 tokens make 0"),
        ({"images": 1}, r"prompts hold 6 image tokens, and 1 image of 3 tokens make 3"),
        ({"images": 3}, r"prompts hold 6 image tokens, and 3 images of 3 tokens make 9"),
        ({"input_ids": torch.tensor([1, 2])}, r"input_ids has shape \(2,\)"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, r"input_ids has shape \(2, 0\)"),
        ({"input_ids": torch.zeros(0, 4, dtype=torch.int64)}, r"input_ids has shape \(0, 4\)"),
        ({"attention_mask": torch.ones(2, 4)}, r"attention_mask has shape \(2, 4\); input_ids has \(2, 5\)"),
        ({"attention_mask": torch.ones(2, 1, 5, 5)}, r"attention_mask has shape \(2, 1, 5, 5\)"),
        ({"attention_mask": torch.ones(3, 5)}, r"attention_mask has shape \(3, 5\); input_ids has \(2, 5\)"),
        ({"attention_mask": torch.ones(1, 5)}, r"attention_mask has shape \(1, 5\); input_ids has \(2, 5\)"),
        ({"position_ids": torch.zeros(3, 2, 5)}, r"position_ids has shape \(3, 2, 5\)"),
        ({"position_ids": torch.zeros(3, 5)}, r"position_ids has shape \(3, 5\); input_ids has \(2, 5\)"),
        ({"attention_mask": torch.tensor([[1] * 5, [0] * 5])}, r"row 1 of attention_mask is all zero"),
        ({"attention_mask": torch.zeros(2, 5)}, r"row 0 of attention_mask is all zero"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    ids, mask = padded([PROMPT, PROMPT], "left")
    arguments = {"input_ids": ids, "attention_mask": mask, "position_ids": None, "images": 2, **changes}
    with pytest.raises(InputError, match=message):
        arrange(INFO, **arguments)
