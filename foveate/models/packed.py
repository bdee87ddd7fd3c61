"""Families whose images and videos have grids of their own: a batch's patches stand in one packed sequence."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.errors import InputError, UnsupportedModelError
from foveate.ir.layout import Layout
from foveate.ir.program import ModelInfo
from foveate.models.decoder import common
from foveate.models.family import Family, Given
from foveate.models.recording import Inputs, Size

KINDS = (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw"))
"""What comes of images, and of videos: patches, and frames, rows and columns of them."""

SAMPLE_SIDE = 8
"""Tokens that a side of a random image has at most."""

GRID = (16, 16)
"""Visual tokens of a nominal image: 448 x 448 pixels for patches of 14 pixels, merged two by two."""

Block = tuple[Sequence[int], int, int]
"""Visual tokens that stand in one piece: the time of each frame, rows, and columns."""


def left(layout: Layout, out: Given | None) -> Layout:
    """A layout without the tokens that a selection let go: those that do not stay by `out`."""
    if out is None or "stays" not in out:
        return layout
    here = torch.arange(len(layout), device=layout.feature.device)
    return replace(layout, origin=here, gone=~out["stays"][layout.feature])


class Packed(Family):
    """A family with packed patches; what a subclass has to add is `vision` and `describe`."""

    takes: ClassVar[tuple[str, ...]] = (
        "pixel_values",
        "image_grid_thw",
        "pixel_values_videos",
        "video_grid_thw",
        "mm_token_type_ids",
    )
    """The last tells what the ids tell too."""
    position_axes = (3,)

    def vision_inputs(self, info: ModelInfo, size: Size) -> Inputs:
        """Packed patches [n, values of a patch], row and column of each, and where each frame begins and ends."""
        return {
            "pixel_values": ((size("patches"), values_of(info)), None),
            "patch_positions": ((size("patches"), 2), torch.int64),
            "cu_seqlens": ((size("images") + 1,), torch.int32),
        }

    def tower_layers(self, model: Any) -> int:
        """All."""
        return int(model.config.vision_config.depth)

    def vision_given(self, info: ModelInfo, given: Given) -> dict[str, Tensor] | None:
        """The patches of images before those of videos, with their places."""
        patches, grids = [], []
        width, merge = values_of(info), merge_of(info)
        for pixels_name, grid_name in KINDS:
            pixels, grid = given.get(pixels_name), given.get(grid_name)
            if pixels is None and grid is None:
                continue
            if pixels is None or grid is None:
                raise InputError(
                    f"{pixels_name} and {grid_name} belong together: give both, as the processor returns them"
                )
            if grid.dim() != 2 or grid.shape[1] != 3 or pixels.dim() != 2 or pixels.shape[1] != width:
                raise InputError(
                    f"{grid_name} has shape {tuple(grid.shape)} and {pixels_name} {tuple(pixels.shape)}; this model "
                    f"takes [images, 3] and [patches, {width}]"
                )
            if bool((grid < 1).any()) or bool((grid[:, 1:] % merge).any()) or int(grid.prod(1).sum()) != len(pixels):
                raise InputError(
                    f"{grid_name} {grid.tolist()} makes {int(grid.prod(1).sum())} patches, and {pixels_name} holds "
                    f"{len(pixels)}; sides must be divisible by {merge}"
                )
            patches.append(pixels)
            grids.append(grid)
        if not patches or not sum(map(len, patches)):
            return None
        frames = frames_of(torch.cat(grids))
        lengths = frames.prod(1).cumsum(0)
        places = torch.cat([patch_places(height, width, merge) for height, width in frames.tolist()])
        return {
            "pixel_values": torch.cat(patches),
            "patch_positions": places.to(lengths.device),
            "cu_seqlens": torch.nn.functional.pad(lengths, (1, 0)).int(),
        }

    def layout(self, info: ModelInfo, given: Given, kinds: Tensor, out: Given | None) -> Layout:
        """Row by row, images before videos; every frame of a video has a grid of its own."""
        video = (
            torch.zeros_like(kinds, dtype=torch.bool) if info.video_token_id is None else kinds == info.video_token_id
        )
        feature, coords = torch.zeros_like(kinds), kinds.new_zeros(len(kinds), 3)
        tokens = units = 0
        for (_, grid_name), mine, name in zip(KINDS, (~video, video), ("image", "video"), strict=True):
            frames = frames_of(token_grids(info, given, grid_name))
            count = int(frames.prod(1).sum())
            if int(mine.sum()) != count:
                raise InputError(
                    f"the prompts hold {int(mine.sum())} {name} tokens, and {grid_name} makes {count}: let the "
                    f"processor see each {name} with its prompt"
                )
            if count:
                places = [_raster(units + i, height, width) for i, (height, width) in enumerate(frames.tolist())]
                coords[mine] = torch.cat(places).to(kinds.device)
                feature[mine] = torch.arange(tokens, tokens + count, device=kinds.device)
            tokens, units = tokens + count, units + len(frames)
        return left(Layout(feature, coords, torch.ones_like(video)), out)

    def sample(self, info: ModelInfo, images: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        """Noise on random grids."""
        if not images:
            return [], {}
        sides = torch.randint(1, SAMPLE_SIDE + 1, (images, 2), generator=generator)
        grids = torch.cat([torch.ones(images, 1, dtype=torch.int64), sides * merge_of(info)], dim=1)
        pixels = torch.randn(int(grids.prod(1).sum()), values_of(info), generator=generator)
        return sides.prod(1).tolist(), {"pixel_values": pixels, "image_grid_thw": grids}

    def pictures(self, info: ModelInfo, given: Given) -> list[Tensor]:
        """Each image and frame; of two frames in one, the first."""
        vision, merge = info.config["vision_config"], merge_of(info)
        side, found = vision["patch_size"], []
        for pixels_name, grid_name in KINDS:
            if given.get(grid_name) is None:
                continue
            frames = frames_of(given[grid_name].cpu()).tolist()
            packed = given[pixels_name].split([height * width for height, width in frames])
            for (height, width), patches in zip(frames, packed, strict=True):
                blocks = patches.view(height // merge, width // merge, merge, merge, 3, -1, side, side)[..., 0, :, :]
                found.append(blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(3, height * side, width * side))
        return found

    def positions(self, info: ModelInfo, given: Given, ids: Tensor, real: Tensor) -> Tensor:
        """Positions int64 [3, B, S] of M-RoPE: see `mrope`; a video's frames are one time step apart."""
        images, videos = (
            [(range(frames), height, width) for frames, height, width in token_grids(info, given, name).tolist()]
            for _, name in KINDS
        )
        return mrope(info, ids, real, images, videos)

    def images_in(self, info: ModelInfo, given: Given, ids: Tensor) -> dict[str, list[int]]:
        """By the tokens that each grid makes."""
        counts: dict[str, list[int]] = {"mm_token_type_ids": [1] * len(ids)}
        for (pixels_name, grid_name), token in zip(KINDS, (info.image_token_id, info.video_token_id), strict=True):
            sizes = token_grids(info, given, grid_name).prod(1).cumsum(0)
            ends = torch.eq(ids, -1 if token is None else token).sum(1).cumsum(0).cpu()
            upto = [0, *torch.searchsorted(sizes, ends, right=True).tolist()]
            patches = torch.nn.functional.pad(sizes, (1, 0))[upto] * info.patches_per_token
            counts[grid_name] = [b - a for a, b in itertools.pairwise(upto)]
            counts[pixels_name] = patches.diff().tolist()
        return {name: each for name, each in counts.items() if name in given and len(given[name]) == sum(each)}


def about(config: Any, family: str, deepstack: int = 0) -> ModelInfo:
    """Sizes and names of a model of a family with this configuration; deepstack: see `ModelInfo`.

    Raises UnsupportedModelError for patches that are not square, sliding windows, or a rotary embedding that is not
    supported.
    """
    text, vision = config.text_config, config.vision_config
    for name in ("patch_size", "temporal_patch_size"):
        if not isinstance(getattr(vision, name), int):
            raise UnsupportedModelError(f"{name} {getattr(vision, name)!r} is not supported; one number is")
    if getattr(text, "sliding_window", None) is not None:
        raise UnsupportedModelError(
            f"sliding window attention ({text.sliding_window} tokens) is not supported; use_sliding_window=False is"
        )
    merged = vision.spatial_merge_size
    height, width = (count * merged * vision.patch_size for count in GRID)
    return ModelInfo(
        family=family,
        **common(config),
        grid=GRID,
        image_size=(vision.in_channels, height, width),
        patches_per_token=merged**2,
        video_token_id=config.video_token_id,
        deepstack=deepstack,
        uniform=False,
        tower="packed",
    )


def mrope(info: ModelInfo, ids: Tensor, real: Tensor, images: Sequence[Block], videos: Sequence[Block]) -> Tensor:
    """Positions int64 [3, B, S] of M-RoPE (Qwen2-VL, arXiv 2409.12191, section 2.1): time, row and column.

    ids, real: [B, S], tokens, and which are not padding. images, videos: their blocks, in the order of the prompts.
    Text counts on by one in all three. A visual token stands at where its block begins plus its time, row and column,
    and the text behind goes on as far as the longer side reached. Raises InputError for blocks that do not fit.
    """
    queues = {False: iter(images), True: iter(videos)}
    found = torch.zeros(3, *ids.shape, dtype=torch.int64)
    visual = info.visual(ids)
    for row, there in enumerate(real.cpu()):
        tokens = ids[row, there].tolist()
        seen = visual[row, there].nonzero().flatten().tolist()
        pieces, at, start = [torch.zeros(3, 0, dtype=torch.int64)], 0, 0
        while at < len(tokens):
            place = bisect.bisect_left(seen, at)
            if place == len(seen) or seen[place] > at:
                size = advance = (seen[place] if place < len(seen) else len(tokens)) - at
                pieces.append(start + torch.arange(size).expand(3, -1))
            else:
                times, height, width = next(queues[tokens[at] == info.video_token_id], ((), 0, 0))
                size, advance = len(times) * height * width, max(height, width)
                if len(set(tokens[at : at + size])) != 1 or len(tokens) < at + size:
                    raise InputError(f"row {row}: an image or video has fewer tokens in the prompt than its grid says")
                axes = [torch.tensor(list(times)), torch.arange(height), torch.arange(width)]
                pieces.append(start + torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1))
            at, start = at + size, start + advance
        found[:, row, there] = torch.cat(pieces, dim=1)
    return found.to(ids.device)


def token_grids(info: ModelInfo, given: Given, name: str) -> Tensor:
    """Frames, rows and columns of visual tokens of each image or video: int64 [I, 3]."""
    grid = given.get(name)
    if grid is None:
        return torch.zeros(0, 3, dtype=torch.int64)
    return grid.cpu() // torch.tensor([1, merge_of(info), merge_of(info)])


def frames_of(grids: Tensor) -> Tensor:
    """Rows and columns of each frame: [frames of all, 2]."""
    return grids[:, 1:].repeat_interleave(grids[:, 0], dim=0)


def patch_places(height: int, width: int, merge: int) -> Tensor:
    """Row and column of a frame's patches, those that become one token together: int64 [height * width, 2]."""
    sizes = (height // merge, width // merge, merge, merge)
    rows = torch.arange(height).view(sizes[0], 1, merge, 1).expand(sizes)
    columns = torch.arange(width).view(1, sizes[1], 1, merge).expand(sizes)
    return torch.stack([rows.flatten(), columns.flatten()], dim=1)


def _raster(unit: int, height: int, width: int) -> Tensor:
    """Unit, row and column of a frame's tokens: int64 [height * width, 3]."""
    place = torch.arange(height * width)
    return torch.stack([torch.full_like(place, unit), place // width, place % width], dim=1)


def values_of(info: ModelInfo) -> int:
    """Values of a patch."""
    vision = info.config["vision_config"]
    return int(vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2)


def merge_of(info: ModelInfo) -> int:
    """Patches a side that become one token."""
    return int(info.config["vision_config"]["spatial_merge_size"])
