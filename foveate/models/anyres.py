"""Running families that cut an image of any size into tiles: the whole image small, then tiles of it in full detail.

    prompt    the whole, row by row | rows of all tiles that stand side by side, without what pads the image, each
              row closed by a newline
    tower     tiles [T, channels, height, width] -> [T, N + 1, D]: N patches, and the newline's embedding

Which tiles there are, and what pads the image, only `image_sizes` tells (LLaVA-NeXT, llava-vl.github.io, January 2024).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError, UnsupportedModelError
from foveate.ir.layout import Layout
from foveate.ir.program import ModelInfo
from foveate.models import llava
from foveate.models.family import Given

NEWLINE = -1
"""What stands for a newline where patches are numbered."""


class Vision(llava.Vision):
    """Tiles [T, C, height, width] to [T, N + 1, hidden size]: N visual embeddings, and the newline's."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Tower, feature layer, projector; the newline is a weight of the model."""
        features = super().forward(pixel_values)
        newline = self.model.model.image_newline.expand(features.shape[0], 1, -1)
        return torch.cat([features, newline], dim=1)


def check_pinpoints(config: Any, side: int) -> None:
    """Raise UnsupportedModelError where resolutions of `image_grid_pinpoints` are no whole numbers of tiles."""
    for height, width in config.image_grid_pinpoints:
        if height % side or width % side or height < side or width < side:
            raise UnsupportedModelError(
                f"image_grid_pinpoints holds {[height, width]}, which is not a whole number of tiles of {side} pixels"
            )


def sizes_of(given: Given) -> list[list[int]]:
    """Height and width of each image, before it was cut; InputError for what are no sizes."""
    sizes, pixels = given.get("image_sizes"), given.get("pixel_values")
    if (sizes is None) != (pixels is None):
        raise InputError("pixel_values and image_sizes belong together: give both, as the processor returns them")
    if sizes is None:
        return []
    if sizes.dim() != 2 or sizes.shape[1] != 2 or bool((sizes < 1).any()):
        raise InputError(
            f"image_sizes has shape {tuple(sizes.shape)} and holds {sizes.tolist()}; give [images, 2], the height and "
            "width of each image before it was cut"
        )
    found: list[list[int]] = sizes.tolist()
    return found


def tile_grid(info: ModelInfo, size: Sequence[int]) -> tuple[int, int]:
    """How many tiles stand below each other, and side by side, for an image of this height and width."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(tuple(size), info.config["image_grid_pinpoints"])
    return height // info.image_size[1], width // info.image_size[2]


def tile_count(info: ModelInfo, size: Sequence[int]) -> int:
    """How many tiles an image is cut into, that of the whole included."""
    down, across = tile_grid(info, size)
    return 1 + down * across


def detail(info: ModelInfo, size: Sequence[int]) -> Tensor:
    """Numbers of the patches of an image's tiles, as they stand in the image, without what pads it: int64 [h, w].

    The patches of the whole come first, so the first number is that of patches in a tile.
    """
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    down, across = tile_grid(info, size)
    rows, columns = info.grid
    tile = torch.arange(1, 1 + down * across).view(down, 1, across, 1)
    patch = torch.arange(rows * columns).view(1, rows, 1, columns)
    numbers = (tile * rows * columns + patch).reshape(1, down * rows, across * columns)
    found: Tensor = unpad_image(numbers, list(size))[0]
    return found


def with_newlines(numbers: Tensor) -> Tensor:
    """Numbers [h, w], each row closed by a newline: int64 [h * (w + 1)]."""
    return torch.cat([numbers, numbers.new_full((len(numbers), 1), NEWLINE)], dim=1).flatten()


def image_numbers(info: ModelInfo, size: Sequence[int]) -> Tensor:
    """Numbers of the patches of an image, counted through its tiles, in the order of the prompt; newlines between."""
    return torch.cat([torch.arange(info.tokens_per_image), with_newlines(detail(info, size))])


def sample_sizes(info: ModelInfo, images: int, generator: torch.Generator) -> Tensor:
    """Heights and widths of random images, some smaller than a tile: int64 [images, 2]."""
    side = info.image_size[1]
    return torch.randint(max(side // 2, 1), 3 * side, (images, 2), generator=generator)


def sample_given(info: ModelInfo, sizes: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """What a processor would make of random images of these sizes, all of them cut."""
    tiles = sum(tile_count(info, size) for size in sizes.tolist())
    return {"pixel_values": torch.randn(tiles, *info.image_size, generator=generator), "image_sizes": sizes}


def patches(info: ModelInfo, numbers: Tensor, tiles: int, source: Tensor | None = None) -> Layout:
    """The layout of patches, counted through all tiles of a batch, and newlines: int64 [P].

    source: int64 [T, k], the places in their tiles of the patches that a selection left, if one did: they stay where
    they are, and the others are gone.
    """
    tokens = info.tokens_per_image
    tile, place = numbers // tokens, numbers % tokens
    coords = torch.stack([tile, place // info.grid[1], place % info.grid[1]], dim=1)
    patch = numbers != NEWLINE
    sizes = torch.tensor(info.grid).expand(tiles, 2)
    coords = coords.masked_fill(~patch[:, None], NEWLINE)
    if source is None:
        return Layout(feature_of(info, numbers), coords, patch, sizes=sizes)
    count = source.shape[1]
    first = torch.arange(len(source), device=source.device)[:, None]
    left = torch.full((tiles * tokens + 1,), -1, device=source.device)
    left[first * tokens + source] = first * (count + 1) + torch.arange(count, device=source.device)
    left[NEWLINE] = count
    feature = left[numbers]
    here = torch.arange(len(numbers), device=numbers.device)
    return Layout(feature.clamp(min=0), coords, patch, here, feature < 0, sizes)


def feature_of(info: ModelInfo, numbers: Tensor) -> Tensor:
    """Which of the tower's tokens patches and newlines are; every tile has a newline, and the first will do."""
    tokens = info.tokens_per_image
    return torch.where(numbers == NEWLINE, tokens, numbers + numbers // tokens)


def tiles_of(info: ModelInfo, pixels: Tensor, counts: Sequence[int]) -> Tensor:
    """The tiles of all images [T, C, height, width], from pixels that may be padded to the most tiles of an image.

    Raises InputError for pixels that are not as many tiles as `counts` says.
    """
    shape, size = tuple(pixels.shape), info.image_size
    if pixels.dim() == 5 and shape[2:] == size and shape[0] == len(counts) and shape[1] >= max(counts, default=0):
        rows = [each[:count] for each, count in zip(pixels, counts, strict=True)]
        return torch.cat(rows) if rows else pixels.flatten(0, 1)
    if pixels.dim() == 4 and shape[1:] == size and shape[0] == sum(counts):
        return pixels
    wanted = ", ".join(map(str, size))
    raise InputError(
        f"pixel_values has shape {shape}, and image_sizes make {list(counts)} tiles of {len(counts)} images; this "
        f"model takes [images, most tiles, {wanted}], or [tiles, {wanted}]"
    )


def check_count(kind: str, there: int, made: int) -> None:
    """Raise InputError where the prompts do not hold as many tokens of a kind as their images make."""
    if there != made:
        raise InputError(
            f"the prompts hold {there} {kind} tokens, and what is given makes {made}: let the processor see each "
            f"{kind} with its prompt"
        )


def counts_in(ids: Tensor, token: int | None, tokens: Sequence[int]) -> list[int]:
    """How many images belong to each prompt of ids [B, S], where each becomes so many of that token."""
    ends = torch.eq(ids, -1 if token is None else token).sum(1).cumsum(0).cpu()
    reached = torch.tensor([0, *tokens]).cumsum(0)[1:]
    upto = [0, *torch.searchsorted(reached, ends, right=True).tolist()]
    return [b - a for a, b in itertools.pairwise(upto)]


def sums(values: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Of values that come in groups of so many, the sum of each group."""
    rest = iter(values)
    return [sum(itertools.islice(rest, count)) for count in counts]
