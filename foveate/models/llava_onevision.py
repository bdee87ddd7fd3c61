"""LLaVA-OneVision: a SigLIP tower over tiles of any image and over frames, an MLP projector, and a Qwen2 decoder.

    one image of a prompt      the whole, and tiles of it; shrunk, where they are too many
    several images             the whole of each, and a newline
    a video                    every frame at half its resolution, and a newline at the end

(arXiv 2408.03326, section 3.2.) The tower makes patches of all tiles and frames; shrinking follows it, in `layout`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError, UnsupportedModelError
from foveate.ir.layout import Layout
from foveate.ir.program import ModelInfo
from foveate.models import anyres
from foveate.models.decoder import check_decoder, common
from foveate.models.family import Given
from foveate.models.llava import Llava, check_head

DECODERS = ("llama", "qwen2")
ASPECT = re.compile(r"anyres_max_([1-9]\d*)")


class LlavaOnevision(Llava):
    """LLaVA-OneVision, whose tiles and frames count as images."""

    vision = anyres.Vision
    takes = ("pixel_values", "image_sizes", "batch_num_images", "pixel_values_videos")

    def describe(self, config: Any) -> ModelInfo:
        """Sizes and names of a LLaVA-OneVision with this configuration; a tile, or a frame, counts as an image.

        Raises UnsupportedModelError for a tower, decoder, rotary embedding or image sizes that are not supported.
        """
        text, vision = config.text_config, config.vision_config
        if vision.model_type != "siglip_vision_model":
            raise UnsupportedModelError(
                f"vision tower {vision.model_type!r} is not supported in a LLaVA-OneVision; siglip_vision_model is"
            )
        check_head(vision)
        check_decoder(text, DECODERS, "a LLaVA-OneVision")
        if config.vision_feature_select_strategy != "full":
            raise UnsupportedModelError(
                f"vision_feature_select_strategy {config.vision_feature_select_strategy!r} drops the first patch of a "
                "tower that has no CLS token; use 'full'"
            )
        if not ASPECT.fullmatch(config.vision_aspect_ratio):
            raise UnsupportedModelError(
                f"vision_aspect_ratio {config.vision_aspect_ratio!r} is not supported; anyres_max_9, or another "
                "number, is"
            )
        anyres.check_pinpoints(config, vision.image_size)
        side = vision.image_size // vision.patch_size
        return ModelInfo(
            family="llava_onevision",
            **common(config),
            grid=(side, side),
            image_size=(vision.num_channels, vision.image_size, vision.image_size),
            uniform=False,
            tower="shrunk",
            video_token_id=config.video_token_id,
        )

    def vision_given(self, info: ModelInfo, given: Given) -> dict[str, Tensor] | None:
        """The tiles of all images, before the frames of all videos."""
        tiles, images = [], _images(given)
        if "pixel_values" in given:
            tiles.append(anyres.tiles_of(info, given["pixel_values"], [_tiles(info, image) for image in images]))
        if _videos(info, given):
            tiles.append(given["pixel_values_videos"].flatten(0, 1))
        found = torch.cat(tiles) if tiles else None
        return None if found is None or not len(found) else {"pixel_values": found}

    def layout(self, info: ModelInfo, given: Given, kinds: Tensor, out: Given | None) -> Layout:
        """Image by image, then video by video; every tile, shrunk image and frame has a grid of its own."""
        images, videos, frames = _images(given), _videos(info, given), _frames(given)
        of_videos = torch.eq(kinds, -1 if info.video_token_id is None else info.video_token_id)
        tiles = sum(_tiles(info, image) for image in images) + videos * frames
        places = _Places(info, tiles, None if out is None else out["out"].flatten(0, -2))
        of_image = [part for image in images for part in places.image(image)]
        of_video = [part for _ in range(videos) for part in places.video(frames)]
        feature, coords = torch.zeros_like(kinds), kinds.new_zeros(len(kinds), 3)
        for name, mine, parts in (("image", ~of_videos, of_image), ("video", of_videos, of_video)):
            anyres.check_count(name, int(mine.sum()), sum(len(part) for part in parts))
            if parts:
                found = torch.cat(parts).to(kinds.device)
                feature[mine], coords[mine] = found[:, 0], found[:, 1:]
        units = torch.tensor(places.units, dtype=torch.int64).view(-1, 2)
        return Layout(feature, coords, coords[:, 0] != anyres.NEWLINE, sizes=units, features=places.features())

    def sample(self, info: ModelInfo, images: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        """Noise of random sizes."""
        sizes, places = anyres.sample_sizes(info, images, generator), _Places(info, 0, None)
        tokens = [sum(map(len, places.image((size, True)))) for size in sizes.tolist()]
        return tokens, anyres.sample_given(info, sizes, generator) if images else {}

    def pictures(self, info: ModelInfo, given: Given) -> list[Tensor]:
        """Each tile and frame; of a shrunk image, all its tiles in one."""
        from transformers.models.llava_onevision.modeling_llava_onevision import unpad_image

        seen = self.vision_given(info, given)
        tiles: Iterator[Tensor] = iter(() if seen is None else seen["pixel_values"])
        found: list[Tensor] = []
        for size, cut in _images(given):
            found.append(next(tiles))
            mine = list(itertools.islice(tiles, _tiles(info, (size, cut)) - 1))
            if mine and shrunk(info, anyres.detail(info, size).shape) is not None:
                down, across = anyres.tile_grid(info, size)
                rows = [torch.cat(mine[row * across : (row + 1) * across], dim=2) for row in range(down)]
                mine = [unpad_image(torch.cat(rows, dim=1), size)]
            found += mine
        return [*found, *tiles]

    def images_in(self, info: ModelInfo, given: Given, ids: Tensor) -> dict[str, list[int]]:
        """By the tokens that each image makes."""
        all_images, places = _images(given), _Places(info, 0, None)
        tokens = [sum(map(len, places.image(image))) for image in all_images]
        images = anyres.counts_in(ids, info.image_token_id, tokens)
        padded = "pixel_values" in given and given["pixel_values"].dim() == 5
        tiles = anyres.sums([_tiles(info, image) for image in all_images], images)
        clip = math.prod(_pooled(info)) * _frames(given) + 1
        counts = {
            "image_sizes": images,
            "pixel_values": images if padded else tiles,
            "pixel_values_videos": anyres.counts_in(ids, info.video_token_id, [clip] * _videos(info, given)),
        }
        if "batch_num_images" in given:
            # An entry is a prompt's, and prompts without images may have none.
            reached, ends = given["batch_num_images"].cpu().cumsum(0), torch.tensor(images).cumsum(0)
            upto = [0, *torch.searchsorted(reached, ends, right=True).tolist()]
            counts["batch_num_images"] = [b - a for a, b in itertools.pairwise(upto)]
        return {name: each for name, each in counts.items() if name in given and len(given[name]) == sum(each)}


class _Places:
    """Where the tokens of images and videos come from, one after the other.

    A part is int64 [n, 4]: which feature each token is, counted through the tower's own (N + 1 a tile) and those that
    are made of them; its unit, row and column. flat: the tower's features [T * (N + 1), D], if they are there.
    """

    def __init__(self, info: ModelInfo, tiles: int, flat: Tensor | None) -> None:
        self.info = info
        self.flat = flat
        self.tiles = 0
        self.units: list[tuple[int, int]] = []
        self.count = tiles * (info.tokens_per_image + 1)
        self.more: list[Tensor] = []

    def image(self, image: tuple[list[int], bool]) -> list[Tensor]:
        """The parts of an image, whose height and width are given, and whether it was cut into tiles."""
        info, (size, cut) = self.info, image
        first, self.tiles = self.tiles, self.tiles + _tiles(info, image)
        whole = anyres.feature_of(info, first * info.tokens_per_image + _raster(info.grid))
        parts = [self._unit(whole)]
        if not cut:
            return [*parts, self._newline(1)]
        numbers = first * info.tokens_per_image + anyres.detail(info, size)
        small = shrunk(info, numbers.shape)
        if small is not None:
            (rows,) = self._unit(self._shrink(numbers[None], small)[0]).view(1, *small, 4)
        else:
            tile, place = numbers // info.tokens_per_image - first, numbers % info.tokens_per_image
            where = [len(self.units) - 1 + tile, place // info.grid[1], place % info.grid[1]]
            rows = torch.stack([anyres.feature_of(info, numbers), *where], dim=2)
            self.units += [info.grid] * (_tiles(info, image) - 1)
        ends = self._newline(len(rows)).view(-1, 1, 4)
        return [*parts, torch.cat([rows, ends], dim=1).flatten(0, 1)]

    def video(self, frames: int) -> list[Tensor]:
        """The parts of a video: its frames, at half their resolution, and a newline."""
        tokens = self.info.tokens_per_image
        first, self.tiles = self.tiles, self.tiles + frames
        numbers = torch.arange(first, self.tiles).view(-1, 1, 1) * tokens + _raster(self.info.grid)
        pooled = self._shrink(numbers, _pooled(self.info))
        return [*(self._unit(frame) for frame in pooled), self._newline(1)]

    def features(self) -> Tensor | None:
        """What features count, where the tower's own are not enough: [n, D]."""
        return torch.cat([self.flat, *self.more]) if self.flat is not None and self.more else None

    def _unit(self, feature: Tensor) -> Tensor:
        """A part of features [rows, columns] that are a grid of their own."""
        rows, columns = feature.shape
        self.units.append((rows, columns))
        place = _raster((rows, columns))
        where = [torch.full_like(place, len(self.units) - 1), place // columns, place % columns]
        return torch.stack([feature, *where], dim=2).flatten(0, 1)

    def _newline(self, count: int) -> Tensor:
        """A part of newlines alone."""
        places = torch.full((count, 3), anyres.NEWLINE)
        return torch.cat([torch.full((count, 1), self.info.tokens_per_image), places], dim=1)

    def _shrink(self, numbers: Tensor, size: Sequence[int]) -> Tensor:
        """Features [b, *size] that are interpolated from patches [b, rows, columns]."""
        made = self.count + _raster((len(numbers) * size[0], size[1])).view(-1, *size)
        self.count += made.numel()
        if self.flat is not None:
            values = self.flat[anyres.feature_of(self.info, numbers).to(self.flat.device)].permute(0, 3, 1, 2)
            small = torch.nn.functional.interpolate(values.contiguous(), tuple(size), mode="bilinear")
            self.more.append(small.permute(0, 2, 3, 1).flatten(0, 2))
        return made


def shrunk(info: ModelInfo, size: Sequence[int]) -> tuple[int, int] | None:
    """What rows and columns of an image's patches are shrunk to; None where there are not too many."""
    found = ASPECT.fullmatch(info.config["vision_aspect_ratio"])
    assert found is not None  # `describe` looked
    ratio = math.sqrt(size[0] * size[1] / (int(found[1]) * info.tokens_per_image))
    return (int(size[0] // ratio), int(size[1] // ratio)) if ratio > 1.1 else None


def _images(given: Given) -> list[tuple[list[int], bool]]:
    """Height and width of each image, and whether it was cut into tiles: not where a prompt has several."""
    sizes, groups = anyres.sizes_of(given), given.get("batch_num_images")
    if groups is None:
        return [(size, True) for size in sizes]
    alone = [count == 1 for count in groups.flatten().tolist() for _ in range(count)]
    if groups.dim() != 1 or len(alone) != len(sizes):
        raise InputError(
            f"batch_num_images {groups.tolist()} counts {len(alone)} images, and image_sizes has {len(sizes)}: give "
            "both, as the processor returns them"
        )
    return list(zip(sizes, alone, strict=True))


def _videos(info: ModelInfo, given: Given) -> int:
    """How many videos there are; InputError for pixels that are no frames."""
    frames = given.get("pixel_values_videos")
    if frames is None:
        return 0
    if frames.dim() != 5 or tuple(frames.shape[2:]) != info.image_size:
        raise InputError(
            f"pixel_values_videos has shape {tuple(frames.shape)}; this model takes [videos, frames, "
            f"{', '.join(map(str, info.image_size))}]"
        )
    return len(frames)


def _frames(given: Given) -> int:
    """Frames of each video."""
    return given["pixel_values_videos"].shape[1] if "pixel_values_videos" in given else 0


def _tiles(info: ModelInfo, image: tuple[list[int], bool]) -> int:
    """How many tiles the tower sees of an image."""
    return anyres.tile_count(info, image[0]) if image[1] else 1


def _pooled(info: ModelInfo) -> tuple[int, int]:
    """Rows and columns of a frame's tokens."""
    return math.ceil(info.grid[0] / 2), math.ceil(info.grid[1] / 2)


def _raster(size: tuple[int, int]) -> Tensor:
    """The numbers 0, 1, ... row by row: int64 of that size."""
    return torch.arange(math.prod(size)).view(*size)
