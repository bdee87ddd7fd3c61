"""From what a processor returns to the two streams that a program takes.

Visual tokens of a row stand at the left of their stream, text tokens at the right of theirs, so that the last text
token is the last column for every row and the first visual token the first; what is left over is padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.ir.program import ModelInfo
from foveate.ops import PAD

NOWHERE = -(2**11)
"""Row and column of a visual token that has no place in its image, such as CLS: far from all that have one."""


@dataclass(frozen=True)
class Stream:
    """One stream of a batch: where its tokens stand in the prompt.

    index: int64 [B, n] place in the prompt (0 in padding); order: the same with `PAD` in padding, as
    `foveate::attention` takes it; position_ids: int64 [B, n] for rotary embeddings.
    """

    index: Tensor
    order: Tensor
    position_ids: Tensor


@dataclass(frozen=True)
class Images:
    """The visual tokens that a batch's images became.

    features: [I, k, D]. source: int64 [I, k], the place on the grid, row by row, that each stands for, -1 for none
    (None: all, in order). count: int64 [I], how many of an image's k there are (None: all).
    """

    features: Tensor
    source: Tensor | None = None
    count: Tensor | None = None

    @property
    def width(self) -> int:
        """Tokens that an image has room for."""
        return self.features.shape[1]

    def counts(self) -> Tensor:
        """How many tokens each image has: int64 [I]."""
        if self.count is not None:
            return self.count
        return torch.full((len(self.features),), self.width, device=self.features.device)


@dataclass(frozen=True)
class Streams:
    """A batch of prompts, taken apart.

    feature: int64 [B, S], which visual embedding stands at each place of the prompt (only where `image` is true).
    origin: int64 [B, S], the place of the image token that a visual token at this place stands for; PAD for none.
    prefix: see `foveate.ops.attention`. next_position: int64 [B, 1], position of the first generated token.
    coords, grids: see `foveate.ops.neighbor_attention`; images are counted through the whole batch.
    """

    visual: Stream
    text: Stream
    image: Tensor
    feature: Tensor
    origin: Tensor
    prefix: int
    next_position: Tensor
    coords: Tensor
    grids: Tensor


def arrange(
    info: ModelInfo,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    images: Images | None,
    asked: Tensor | None = None,
) -> Streams:
    """Take a batch of prompts [B, S] apart; attention_mask and position_ids are those that `shorten` gave.

    A prompt that ends in an image keeps its last visual token with the text, because its row gives the logits; so does
    every visual token that is `asked` for its next token (bool [B, S], when training).
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    image = input_ids == info.image_token_id
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    last = torch.where(real, places, -1).amax(1, keepdim=True)
    visual = image & real & (places != last)
    if asked is not None:
        visual = visual & ~asked
    text = real & ~visual
    if position_ids is None:
        position_ids = (real.cumsum(1) - 1).clamp(min=0)
    position_ids = position_ids.expand_as(input_ids)
    left = _stream(visual, position_ids, places, right=False)
    right = _stream(text, position_ids, places, right=True)
    number, within = _numbered(info, image)
    feature, source = within, within
    if images is not None and images.width:
        feature = number * images.width + within.clamp(max=images.width - 1)
        source = within if images.source is None else images.source.flatten()[feature]
    next_position = position_ids.gather(1, last) + 1
    coords = _coords(info, number.gather(1, left.index), source.gather(1, left.index), left.order)
    whole = images is None or images.source is None
    grids = _grids(info, visual, left.order, right.order, coords) if whole else torch.empty(0, 6, dtype=torch.int64)
    origin = (places - within + source).masked_fill(source < 0, PAD)
    return Streams(left, right, image, feature, origin, _prefix(visual, text), next_position, coords, grids)


def shorten(
    info: ModelInfo,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    images: Images | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Attention mask and position ids of a batch of prompts [B, S] whose images became fewer tokens than they have.

    The tokens that are left take the first places of their image; the others are hidden like padding, and positions
    go on without a gap. Raises InputError where masks, shapes or the number of images do not fit the prompts.
    """
    _check(info, input_ids, attention_mask, position_ids, 0 if images is None else len(images.features))
    if images is not None and (images.source is not None or images.count is not None):
        image = input_ids == info.image_token_id
        number, within = _numbered(info, image)
        gone = image & (within >= images.counts()[number])
        if position_ids is not None:
            hidden = gone if attention_mask is None else gone & attention_mask.bool()
            position_ids = position_ids.expand_as(input_ids) - hidden.cumsum(1)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        attention_mask = real * ~gone
    if attention_mask is not None and not bool(attention_mask.any(1).all()):
        row = int((~attention_mask.bool().any(1)).nonzero()[0, 0])
        raise InputError(f"row {row} of attention_mask is all zero: that prompt has no token to continue from")
    return attention_mask, position_ids


def _numbered(info: ModelInfo, image: Tensor) -> tuple[Tensor, Tensor]:
    """For each place that holds an image token: number of the image in the batch, and of the token in the image."""
    number = (image.flatten().cumsum(0) - 1).clamp(min=0).view_as(image)
    return number // info.tokens_per_image, number % info.tokens_per_image


def _check(
    info: ModelInfo,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    images: int,
) -> None:
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise InputError(
            f"input_ids has shape {tuple(input_ids.shape)}; give [batch, sequence] with at least one token"
        )
    batch, length = input_ids.shape
    for name, value, allowed in (
        ("attention_mask", attention_mask, {(batch, length)}),
        ("position_ids", position_ids, {(batch, length), (1, length)}),
    ):
        if value is not None and tuple(value.shape) not in allowed:
            raise InputError(f"{name} has shape {tuple(value.shape)}; input_ids has {tuple(input_ids.shape)}")
    tokens = int((input_ids == info.image_token_id).sum())
    expected = images * info.tokens_per_image
    if tokens != expected:
        raise InputError(
            f"the prompts hold {tokens} image tokens, and {images} image{'s' * (images != 1)} of "
            f"{info.tokens_per_image} tokens make {expected}: give one <image> in the text for each image"
        )


def _stream(member: Tensor, position_ids: Tensor, places: Tensor, right: bool) -> Stream:
    """The members of each row in order, pushed to one side."""
    width = int(member.sum(1).max())
    key = member if right else ~member
    index = key.int().argsort(dim=1, stable=True)
    index = index[:, index.shape[1] - width :] if right else index[:, :width]
    valid = member.gather(1, index)
    index = index.masked_fill(~valid, 0)
    order = places.gather(1, index).masked_fill(~valid, PAD)
    return Stream(index, order, position_ids.gather(1, index).masked_fill(~valid, 0))


def _prefix(visual: Tensor, text: Tensor) -> int:
    """How many text tokens stand before the image, if every row is text, one block of image, text; else -1."""
    seen = (visual | text).any(0)  # what every row hides stands in no stream
    visual, text = visual[:, seen], text[:, seen]
    first = visual[0]
    if not bool(((visual == first) & (visual | text)).all()):
        return -1
    count = int(first.sum())
    if count == 0:
        return int(text.shape[1])
    start = int(first.int().argmax())
    return start if bool(first[start : start + count].all()) else -1


def _coords(info: ModelInfo, image: Tensor, source: Tensor, order: Tensor) -> Tensor:
    """Image, row and column int64 [B, n, 3] of visual tokens, from their places on the grid; -1 in padding."""
    columns = info.grid[1]
    coords = torch.stack([image, source // columns, source % columns], dim=2)
    coords[..., 1:].masked_fill_((source < 0)[..., None], NOWHERE)
    return coords.masked_fill((order == PAD)[..., None], -1)


def _grids(info: ModelInfo, visual: Tensor, order: Tensor, text_order: Tensor, coords: Tensor) -> Tensor:
    """A row an image, as `foveate.ops.neighbor_attention` takes them; none if an image is not whole or not in one."""
    height, width = info.grid
    counts = visual.sum(1)
    size = height * width
    if bool((counts % size).any()):
        return torch.empty(0, 6, dtype=torch.int64)
    rows = []
    order, text_order, coords = order.cpu(), text_order.cpu(), coords.cpu()
    for row, images in enumerate((counts // size).tolist()):
        first_text = int((text_order[row] == PAD).sum())
        starts = order[row, : images * size].view(images, size)
        corners = coords[row, : images * size : size, 1:]
        if bool((starts[:, -1] - starts[:, 0] != size - 1).any()) or bool(corners.any()):
            return torch.empty(0, 6, dtype=torch.int64)
        for image, start in enumerate(starts[:, 0].tolist()):
            seen = first_text + int((text_order[row] < start).sum())
            rows.append([row, image * size, height, width, first_text, seen])
    return torch.tensor(rows, dtype=torch.int64).view(-1, 6)
