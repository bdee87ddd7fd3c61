"""From what a processor returns to the two streams that a program takes.

Visual tokens of a row stand at the left of their stream, text tokens at the right of theirs, so that the last text
token is the last column for every row and the first visual token the first; what is left over is padding.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.errors import InputError
from foveate.ir.layout import Layout
from foveate.ops import PAD


@dataclass(frozen=True)
class Stream:
    """One stream of a batch: where its tokens stand in the prompt.

    index: int64 [B, n] place in the prompt (0 in padding); order: int64 [B, n], which of two tokens is the later one,
    as `foveate::attention` takes it: the place, but that gaps which images have left are closed; `PAD` in padding.
    position_ids: int64 [B, n] for rotary embeddings, or [3, B, n] for M-RoPE.
    """

    index: Tensor
    order: Tensor
    position_ids: Tensor


@dataclass(frozen=True)
class Streams:
    """A batch of prompts, taken apart.

    feature: int64 [B, S], which visual embedding stands at each place of the prompt (only where `image` is true).
    order: int64 [B, S], that of the token at each place. origin: int64 [B, S], by order: the place that a token stands
    for, which is its own place or that of an image's token; PAD for none.
    prefix: see `foveate.ops.attention`. next_position: int64 [B, 1], position of the first generated token.
    coords, grids: see `foveate.ops.neighbor_attention`; images are counted through the whole batch.
    """

    visual: Stream
    text: Stream
    image: Tensor
    feature: Tensor
    order: Tensor
    origin: Tensor
    prefix: int
    next_position: Tensor
    coords: Tensor
    grids: Tensor


def arrange(
    input_ids: Tensor,
    image: Tensor,
    layout: Layout,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    asked: Tensor | None = None,
) -> Streams:
    """Take a batch of prompts [B, S] apart; attention_mask and position_ids are those that `shorten` gave.

    image: bool [B, S], where the layout's tokens stand. A prompt that ends in an image keeps its last visual token with
    the text, because its row gives the logits; so does what is no patch, and every visual token that is `asked` for its
    next token (bool [B, S], when training).
    """
    real = torch.ones_like(image) if attention_mask is None else attention_mask.bool()
    places = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
    last = torch.where(real, places, -1).amax(1, keepdim=True)
    visual = _at(image, layout.patch) & real & (places != last)
    if asked is not None:
        visual = visual & ~asked
    text = real & ~visual
    if position_ids is None:
        position_ids = (real.cumsum(1) - 1).clamp(min=0)
    position_ids = position_ids.expand(*position_ids.shape[:-2], *input_ids.shape)
    order = places if layout.gone is None else _closed(real)
    left = _stream(visual, position_ids, order, right=False)
    right = _stream(text, position_ids, order, right=True)
    ends = position_ids.gather(-1, last.expand(*position_ids.shape[:-1], 1))
    if position_ids.dim() > 2:  # an image's last token need not be the one farthest along, nor be left
        there = real if layout.gone is None else real | _at(image, layout.gone)
        ends = position_ids.masked_fill(~there, -1).amax((0, 2))[:, None]
    coords = torch.stack([_at(image, axis) for axis in layout.coords.unbind(1)], dim=2)
    coords = _take(coords, left.index).masked_fill((left.order == PAD)[..., None], -1)
    whole = layout.origin is None
    grids = _grids(left.order, right.order, coords) if whole else torch.empty(0, 6, dtype=torch.int64)
    origin = places
    if layout.origin is not None:
        there = places[image]
        seen = _at(image, torch.where(layout.origin < 0, PAD, there[layout.origin.clamp(min=0)]))
        own = torch.where(image, seen, places)
        origin = torch.zeros_like(places).scatter_add(1, order, own.masked_fill(~real, 0))
    feature, prefix = _at(image, layout.feature), contiguous_prefix(left.order, right.order)
    return Streams(left, right, image, feature, order, origin, prefix, ends + 1, coords, grids)


def _closed(real: Tensor) -> Tensor:
    """Orders without gaps: the last place is that of the last token that is left, bool [B, S], the others before it.

    What is not left has the order of the token before it. So a window of so many tokens counts those that are left.
    """
    behind = real.flip(1).cumsum(1).flip(1) - real.long()
    return real.shape[1] - 1 - behind


def shorten(
    input_ids: Tensor, image: Tensor, layout: Layout, attention_mask: Tensor | None, position_ids: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Attention mask and position ids of a batch of prompts [B, S] whose images became fewer tokens than they have.

    What is gone is hidden like padding, and positions [B, S] go on without a gap; those of M-RoPE [3, B, S], which say
    where in its image a token stands, stay. Raises InputError where a prompt is all padding.
    """
    if layout.gone is not None:
        gone = _at(image, layout.gone)
        if position_ids is not None and position_ids.dim() == 2:
            hidden = gone if attention_mask is None else gone & attention_mask.bool()
            position_ids = position_ids - hidden.cumsum(1)
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        attention_mask = real * ~gone
    if attention_mask is not None and not bool(attention_mask.any(1).all()):
        row = int((~attention_mask.bool().any(1)).nonzero()[0, 0])
        raise InputError(f"row {row} of attention_mask is all zero: that prompt has no token to continue from")
    return attention_mask, position_ids


def reaches(image: Tensor) -> Tensor:
    """The last place that a token sees of its prompt, int64 [B, S]: its own, or where its run of image tokens ends.

    image: bool [B, S]. Images without a word between them are one run, as in transformers' masks for Gemma 3.
    """
    places = torch.arange(image.shape[1], device=image.device).expand_as(image)
    ends = image & ~torch.nn.functional.pad(image, (0, 1))[:, 1:]
    last = torch.where(ends | ~image, places, image.shape[1])
    return last.flip(1).cummin(1).values.flip(1)


def check_prompts(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, axes: tuple[int, ...] = ()
) -> None:
    """Raise InputError where masks or position ids do not fit the prompts; axes: of positions before the batch."""
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise InputError(
            f"input_ids has shape {tuple(input_ids.shape)}; give [batch, sequence] with at least one token"
        )
    batch, length = input_ids.shape
    for name, value, allowed in (
        ("attention_mask", attention_mask, {(batch, length)}),
        ("position_ids", position_ids, {(*axes, batch, length), (*axes, 1, length)}),
    ):
        if value is not None and tuple(value.shape) not in allowed:
            raise InputError(f"{name} has shape {tuple(value.shape)}; input_ids has {tuple(input_ids.shape)}")


def contiguous_prefix(visual: Tensor, text: Tensor) -> int:
    """How many text tokens stand before the image, if every row is text, one block of image, text; else -1.

    visual, text: the orders int64 [B, n] and [B, m] of both streams.
    """
    if bool((visual == PAD).any()) or bool((text == PAD).any()):
        return -1
    if not visual.shape[1]:
        return int(text.shape[1])
    before, after = (text < visual[:, :1]).sum(1), (text > visual[:, -1:]).sum(1)
    in_one = bool((before + after == text.shape[1]).all()) and bool((before == before[0]).all())
    return int(before[0]) if in_one else -1


def _at(image: Tensor, values: Tensor) -> Tensor:
    """Values [P] of image tokens at their places: [B, S], zero elsewhere."""
    return torch.zeros(image.shape, dtype=values.dtype, device=image.device).masked_scatter(image, values)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Values [B, S, 3] at places [B, n]."""
    return values.gather(1, index[..., None].expand(*index.shape, values.shape[2]))


def _stream(member: Tensor, position_ids: Tensor, orders: Tensor, right: bool) -> Stream:
    """The members of each row in order, pushed to one side."""
    width = int(member.sum(1).max())
    key = member if right else ~member
    index = key.int().argsort(dim=1, stable=True)
    index = index[:, index.shape[1] - width :] if right else index[:, :width]
    valid = member.gather(1, index)
    index = index.masked_fill(~valid, 0)
    order = orders.gather(1, index).masked_fill(~valid, PAD)
    found = position_ids.gather(-1, index.expand(*position_ids.shape[:-1], width))
    return Stream(index, order, found.masked_fill(~valid, 0))


def _grids(order: Tensor, text_order: Tensor, coords: Tensor) -> Tensor:
    """A row an image, as `foveate.ops.neighbor_attention` takes them; none if an image is not whole or not in one."""
    order, text_order, coords = order.cpu(), text_order.cpu(), coords.cpu()
    rows = []
    for row, (places, where) in enumerate(zip(order, coords, strict=True)):
        count = int((places != PAD).sum())
        first_text = int((text_order[row] == PAD).sum())
        begins = where[:count, 0].diff().nonzero().flatten() + 1
        for start, end in itertools.pairwise([0, *begins.tolist(), count]) if count else ():
            height, width = (where[end - 1, 1:] + 1).tolist()
            within = torch.arange(end - start)
            raster = torch.stack([within // max(width, 1), within % max(width, 1)], dim=1)
            in_one = torch.equal(places[start:end], places[start] + within)
            if height * width != end - start or not in_one or not torch.equal(where[start:end, 1:], raster):
                return torch.empty(0, 6, dtype=torch.int64)
            seen = first_text + int((text_order[row] < places[start]).sum())
            rows.append([row, start, height, width, first_text, seen])
    return torch.tensor(rows, dtype=torch.int64).view(-1, 6)
