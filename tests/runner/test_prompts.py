"""Prompts in numpy are taken apart as prompts in torch are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from foveate import ops, streams
from foveate.errors import InputError
from foveate.ir import layout
from foveate.models.registry import FAMILIES
from foveate.runner.prompts import NOWHERE, PAD, Images, Vocabulary, arrange
from tests.ir.programs import TOKENS, weightless

INFO = weightless()[1].info
ABOUT = Vocabulary(INFO.image_token_id, TOKENS, INFO.grid[1], 64, 100)


def test_padding_is_that_of_torch() -> None:
    assert (PAD, NOWHERE) == (ops.PAD, layout.NOWHERE)


def drawn(rng: np.random.Generator) -> tuple[Any, ...]:
    """Ids, mask, positions and images of a random batch: padded anywhere, images in a row, at the start, at the end."""
    rows: list[list[int]] = []
    for _ in range(rng.integers(1, 4)):
        row: list[int] = []
        for _ in range(rng.integers(0, 3)):
            row += [*rng.integers(5, 60, rng.integers(0, 3)), *[INFO.image_token_id] * TOKENS]
        rows.append([*row, *rng.integers(5, 60, rng.integers(0 if row else 1, 4))])
    width = max(map(len, rows))
    left = bool(rng.integers(2))
    pads = [[1] * (width - len(row)) for row in rows]
    ids = np.array([[*pad, *row] if left else [*row, *pad] for pad, row in zip(pads, rows, strict=True)])
    masks = [([0] * len(pad), [1] * len(row)) for pad, row in zip(pads, rows, strict=True)]
    mask = np.array([[*hidden, *seen] if left else [*seen, *hidden] for hidden, seen in masks])
    number = int((ids == INFO.image_token_id).sum()) // TOKENS
    positions = np.arange(width)[None] + 3 if rng.integers(2) else None
    images = None
    if number:
        kind = rng.integers(3)
        k = TOKENS if kind == 0 else int(rng.integers(1, TOKENS))
        source = np.sort(rng.permuted(np.tile(np.arange(-1, TOKENS), (number, 1)), axis=1)[:, :k], 1)
        count = rng.integers(1, k + 1, number) if kind == 2 else None
        images = Images(np.zeros((number, k, 4), np.float32), None if kind == 0 else source, count)
    return ids, mask if rng.integers(4) or mask.min() == 0 else None, positions, images


@pytest.mark.parametrize("seed", range(40))
def test_streams_are_those_of_torch(seed: int) -> None:
    ids, mask, positions, images = drawn(np.random.default_rng(seed))
    given = [None if x is None else torch.from_numpy(x) for x in (ids, mask, positions)]
    out = None
    if images is not None:
        parts = {"out": images.features, "source": images.source, "count": images.count}
        out = {name: torch.from_numpy(value) for name, value in parts.items() if value is not None}
    image = INFO.visual(given[0])
    pixels = {} if out is None else {"pixel_values": torch.empty(len(out["out"]), 0)}
    placed = FAMILIES["llava"].layout(INFO, pixels, given[0][image], out)
    expected = streams.arrange(given[0], image, placed, *streams.shorten(given[0], image, placed, *given[1:]))
    found = arrange(ABOUT, ids, mask, positions, images)
    for name in ("visual", "text"):
        for part in ("index", "order", "position_ids"):
            a, b = getattr(getattr(expected, name), part), getattr(getattr(found, name), part)
            assert np.array_equal(a.numpy(), b), (name, part)
    assert np.array_equal(expected.feature[image].numpy(), found.feature[image.numpy()])
    for name in ("image", "order", "origin", "next_position", "coords"):
        assert np.array_equal(getattr(expected, name).numpy(), getattr(found, name)), name


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (np.ones((2, 0), np.int64), None, "give .batch, sequence. with at least one token"),
        (np.ones(3, np.int64), None, "give .batch, sequence."),
        (np.ones((1, 3), np.int64), np.ones((1, 2), np.int64), r"attention_mask has shape \(1, 2\)"),
        (np.ones((2, 2), np.int64), np.array([[1, 1], [0, 0]]), "row 1 of attention_mask is all zero"),
        (np.full((1, TOKENS), INFO.image_token_id), None, "and 0 images of 16 tokens make 0"),
    ],
)
def test_what_does_not_fit_is_one_error(ids: Any, mask: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        arrange(ABOUT, ids, mask, None, None)


@pytest.mark.parametrize("change", [{"columns": 0}, {"longest": -1}, {"vocabulary": True}, {"image_token_id": "4"}])
def test_a_manifest_that_does_not_say_what_prompts_are(change: dict[str, Any]) -> None:
    told = {**vars(ABOUT), "more": 1}
    assert Vocabulary.of(told) == ABOUT
    with pytest.raises(ValueError, match="prompts must have"):
        Vocabulary.of({**told, **change})
    with pytest.raises(ValueError, match="prompts must have"):
        Vocabulary.of([replace(ABOUT)])
