"""From what a processor returns to the two streams that a package's graphs take: `foveate.streams`, in numpy.

Visual tokens of a row stand at the left of their stream, text tokens at the right of theirs; what is left over is
padding. The ONNX graphs need no more of it than this.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

import numpy as np

from foveate.errors import InputError

Array = np.ndarray[Any, Any]

PAD = int(np.iinfo(np.int64).max)
"""The order of padding: `foveate.ops.PAD`."""

NOWHERE = -(2**11)
"""Row and column of a visual token that has no place in its image: `foveate.streams.NOWHERE`."""


@dataclass(frozen=True)
class Vocabulary:
    """What a package's manifest says of its prompts.

    vocabulary: tokens that there are. longest: tokens of a prompt with its answer. columns: of an image's grid.
    position_limit: see `foveate.ir.program.ModelInfo`; manifests that say nothing of it have none.
    """

    image_token_id: int
    tokens_per_image: int
    columns: int
    vocabulary: int
    longest: int
    position_limit: int | None = None

    @classmethod
    def of(cls, told: Any) -> Vocabulary:
        """From the manifest's entry; ValueError where that is none."""
        names = [field.name for field in fields(cls) if field.default is MISSING]
        if not isinstance(told, dict) or any(type(told.get(name)) is not int or told[name] < 0 for name in names):
            raise ValueError(f"prompts must have these numbers: {', '.join(names)}")
        if not told["tokens_per_image"] or not told["columns"]:
            raise ValueError("prompts must have images of at least one token")
        limit = told.get("position_limit")
        if limit is not None and (type(limit) is not int or limit < 1):
            raise ValueError(f"position_limit of prompts is {limit!r}; it must be a whole number above 0, or left out")
        return cls(**{name: told[name] for name in names}, position_limit=limit)


@dataclass(frozen=True)
class Stream:
    """One stream of a batch: places in the prompt int64 [B, n] (0 in padding), the same with `PAD`, and positions."""

    index: Array
    order: Array
    position_ids: Array


@dataclass(frozen=True)
class Images:
    """The visual tokens of a batch's images: features [I, k, D], and where they come from (see `streams.Images`)."""

    features: Array
    source: Array | None = None
    count: Array | None = None

    @property
    def width(self) -> int:
        """Tokens that an image has room for."""
        return int(self.features.shape[1])


@dataclass(frozen=True)
class Streams:
    """A batch of prompts, taken apart; see `foveate.streams.Streams`."""

    visual: Stream
    text: Stream
    image: Array
    feature: Array
    order: Array
    origin: Array
    next_position: Array
    coords: Array

    def placed(self, order: Array) -> Array:
        """The places in the prompt that tokens [B, ..., k] stand for, `PAD` for none."""
        spare = order == PAD
        found = _take(self.origin, np.where(spare, 0, order).reshape(len(order), -1))
        return np.where(spare, PAD, found.reshape(order.shape))

    def taken(self) -> list[int]:
        """How many positions each prompt takes, without what a selection in the tower let go."""
        found: list[int] = (np.concatenate([self.visual.position_ids, self.text.position_ids], 1).max(1) + 1).tolist()
        return found

    def reaches(self) -> dict[str, Array]:
        """The last place that each token of a stream sees, int64 [B, n], where an image's tokens see each other."""
        reach, streams = _take(self.order, _reaches(self.image)), {"visual": self.visual, "text": self.text}
        return {f"{n}_reach": np.where(s.order == PAD, PAD, _take(reach, s.index)) for n, s in streams.items()}


def _reaches(image: Array) -> Array:
    """The last place that a token sees of its prompt: `foveate.streams.reaches`."""
    places = np.broadcast_to(np.arange(image.shape[1]), image.shape)
    ends = image & ~np.pad(image, ((0, 0), (0, 1)))[:, 1:]
    last = np.where(ends | ~image, places, image.shape[1])
    return np.minimum.accumulate(last[:, ::-1], 1)[:, ::-1]


def taken(input_ids: Array, attention_mask: Array | None, position_ids: Array | None) -> list[int]:
    """How many positions each prompt of a batch [B, S] takes; InputError where masks or shapes do not fit."""
    _check_shapes(input_ids, attention_mask, position_ids)
    real = np.ones_like(input_ids, dtype=bool) if attention_mask is None else attention_mask.astype(bool)
    found: list[int] = (real.sum(1) if position_ids is None else np.where(real, position_ids, -1).max(1) + 1).tolist()
    return found


def arrange(
    about: Vocabulary,
    input_ids: Array,
    attention_mask: Array | None,
    position_ids: Array | None,
    images: Images | None,
) -> Streams:
    """Take a batch of prompts [B, S] apart.

    Images that became fewer tokens than they have in the prompt fill the first of their places; the others are hidden
    like padding. A prompt that ends in an image keeps its last visual token with the text, because its row gives the
    logits. Raises InputError where masks, shapes or the number of images do not fit the prompts.
    """
    _check_shapes(input_ids, attention_mask, position_ids)
    _check_images(about, input_ids, 0 if images is None else len(images.features))
    real = np.ones_like(input_ids, dtype=bool) if attention_mask is None else attention_mask.astype(bool)
    places = order = np.broadcast_to(np.arange(input_ids.shape[1]), input_ids.shape)
    image = input_ids == about.image_token_id
    count = np.maximum(np.cumsum(image) - 1, 0).reshape(image.shape)
    number, within = count // about.tokens_per_image, count % about.tokens_per_image
    shorter = images is not None and (images.source is not None or images.count is not None)
    if images is not None and shorter:
        kept = np.full(len(images.features), images.width) if images.count is None else images.count
        gone = image & (within >= kept[number])
        if position_ids is not None:
            position_ids = position_ids - np.cumsum(gone & real, 1)
        real = real & ~gone
        order = _closed(real)
    if not real.any(1).all():
        row = int(real.any(1).argmin())
        raise InputError(f"row {row} of attention_mask is all zero: that prompt has no token to continue from")
    last = np.where(real, places, -1).max(1, keepdims=True)
    visual = image & real & (places != last)
    if position_ids is None:
        position_ids = np.maximum(np.cumsum(real, 1) - 1, 0)
    position_ids = np.broadcast_to(position_ids, input_ids.shape)
    left = _stream(visual, position_ids, order, right=False)
    right = _stream(real & ~visual, position_ids, order, right=True)
    feature, source = within, within
    if images is not None and images.width:
        feature = number * images.width + np.minimum(within, images.width - 1)
        source = within if images.source is None else images.source.reshape(-1)[feature]
    origin = places
    if shorter:
        seen = np.where(image, np.where(source < 0, PAD, places - within + source), places)
        origin = np.zeros_like(seen)
        np.add.at(origin, (np.arange(len(seen))[:, None], order), np.where(real, seen, 0))
    coords = _coords(about, _take(number, left.index), _take(source, left.index), left.order)
    return Streams(left, right, image, feature, order, origin, _take(position_ids, last) + 1, coords)


def _closed(real: Array) -> Array:
    """Orders without gaps; see `foveate.streams`."""
    behind: Array = np.cumsum(real[:, ::-1], 1)[:, ::-1] - real
    return np.asarray(real.shape[1] - 1 - behind)


def _stream(member: Array, position_ids: Array, orders: Array, right: bool) -> Stream:
    """The members of each row in order, pushed to one side."""
    width = int(member.sum(1).max())
    index = (member if right else ~member).argsort(axis=1, kind="stable")
    index = index[:, index.shape[1] - width :] if right else index[:, :width]
    valid = _take(member, index)
    index = np.where(valid, index, 0)
    order = np.where(valid, _take(orders, index), PAD)
    return Stream(index, order, np.where(valid, _take(position_ids, index), 0))


def _coords(about: Vocabulary, image: Array, source: Array, order: Array) -> Array:
    """Image, row and column int64 [B, n, 3] of visual tokens, from their places on the grid; -1 in padding."""
    coords = np.stack([image, source // about.columns, source % about.columns], 2)
    coords[..., 1:][source < 0] = NOWHERE
    return np.where((order == PAD)[..., None], -1, coords)


def _take(values: Array, index: Array) -> Array:
    return np.take_along_axis(values, index, 1)


def _check_shapes(input_ids: Array, attention_mask: Array | None, position_ids: Array | None) -> None:
    if input_ids.ndim != 2 or not input_ids.size:
        raise InputError(f"input_ids has shape {input_ids.shape}; give [batch, sequence] with at least one token")
    batch, length = input_ids.shape
    for name, value, allowed in (
        ("attention_mask", attention_mask, {(batch, length)}),
        ("position_ids", position_ids, {(batch, length), (1, length)}),
    ):
        if value is not None and value.shape not in allowed:
            raise InputError(f"{name} has shape {value.shape}; input_ids has {input_ids.shape}")


def _check_images(about: Vocabulary, input_ids: Array, images: int) -> None:
    tokens, expected = int((input_ids == about.image_token_id).sum()), images * about.tokens_per_image
    if tokens != expected:
        raise InputError(
            f"the prompts hold {tokens} image tokens, and {images} image{'s' * (images != 1)} of "
            f"{about.tokens_per_image} tokens make {expected}: give one <image> in the text for each image"
        )
