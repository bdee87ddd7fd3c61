"""Random prompts of every family that runs: ragged, several images or none, padded on either side."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.models import tiny

Row = list[tuple[str, int]]
"""A prompt: `("text", length)`, `("image", number)` and so on; the number is that of its kind in the batch."""


@dataclass(frozen=True)
class Made:
    """A batch as a processor returns it, and where its visual tokens lie: int64 [B, S, 3], -1 for text."""

    inputs: dict[str, Tensor]
    coords: Tensor


def made(model: Any, seed: int, rows: list[list[int]] | None = None, padding: str = "left", text: int = 6) -> Made:
    """A random batch; rows: the number of images in each prompt, and behind them of videos, if any."""
    draw = random.Random(seed)
    rows = rows or [[draw.randrange(3)] for _ in range(draw.randrange(1, 4))]
    family: Family = FAMILIES[model.config.model_type](model, seed)
    ids, coords = [], []
    for counts in rows:
        family.row()
        row, places = _text(model, draw, text), [(-1, -1, -1)] * text
        for kind in [kind for kind, count in enumerate(counts) for _ in range(count)]:
            token, found = family.image(draw) if kind == 0 else family.video(draw)
            words = _text(model, draw, draw.randrange(1, 4))
            tokens = [token if place else _text(model, draw, 1)[0] for place in found]
            seen = [place or (-1, -1, -1) for place in found]
            row, places = [*row, *tokens, *words], [*places, *seen, *[(-1, -1, -1)] * len(words)]
        ids.append(row)
        coords.append(places)
    longest = max(map(len, ids))
    for row, places in zip(ids, coords, strict=True):
        pad = longest - len(row)
        left = pad if padding == "left" else 0
        row[:] = [0] * left + row + [0] * (pad - left)
        places[:] = [(-1, -1, -1)] * left + places + [(-1, -1, -1)] * (pad - left)
    found_ids = torch.tensor(ids)
    inputs = {"input_ids": found_ids, "attention_mask": (found_ids != 0).long(), **family.given()}
    if isinstance(family, Whole):
        inputs["token_type_ids"] = (found_ids == model.config.image_token_id).long()
    return Made(inputs, torch.tensor(coords))


def _text(model: Any, draw: random.Random, length: int) -> list[int]:
    special = {getattr(model.config, f"{kind}_token_id", -1) for kind in ("image", "video")}
    words = [word for word in range(2, tiny.VOCAB) if word not in special]
    return [draw.choice(words) for _ in range(length)]


class Family:
    """What a batch's images are made of, one by one; a place that is None is a word within an image."""

    def __init__(self, model: Any, seed: int) -> None:
        self.config = model.config
        self.generator = torch.Generator().manual_seed(seed)
        self.units = itertools.count()

    def row(self) -> None:
        """The next prompt begins."""

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def raster(self, rows: int, columns: int, unit: int | None = None) -> list[tuple[int, int, int]]:
        unit = next(self.units) if unit is None else unit
        return [(unit, row, column) for row in range(rows) for column in range(columns)]


class Tiles(Family):
    """InternVL: an image is one tile, or several and a small one of the whole."""

    def __init__(self, model: Any, seed: int) -> None:
        super().__init__(model, seed)
        vision = self.config.vision_config
        self.size = vision.image_size
        self.side = int(self.size[0] // vision.patch_size[0] * self.config.downsample_ratio)
        self.tiles = 0

    def image(self, draw: random.Random) -> tuple[int, list[tuple[int, int, int]]]:
        tiles = draw.choice((1, 1, 3))
        self.tiles += tiles
        return self.config.image_token_id, [p for _ in range(tiles) for p in self.raster(self.side, self.side)]

    def given(self) -> dict[str, Tensor]:
        return {"pixel_values": self.noise(self.tiles, 3, *self.size)} if self.tiles else {}


class PaddedTiles(Family):
    """SmolVLM, Idefics3: an image is one tile, or rows and columns of them and a small one; each prompt has a row."""

    def __init__(self, model: Any, seed: int) -> None:
        super().__init__(model, seed)
        vision = self.config.vision_config
        self.size = vision.image_size
        self.side = self.size // vision.patch_size // self.config.scale_factor
        self.tiles: list[int] = []

    def row(self) -> None:
        self.tiles.append(0)

    def image(self, draw: random.Random) -> tuple[int, list[tuple[int, int, int] | None]]:
        tiles = draw.choice((1, 1 * 2 + 1, 3 * 1 + 1))
        self.tiles[-1] += tiles
        return self.config.image_token_id, [p for _ in range(tiles) for p in (None, *self.raster(self.side, self.side))]

    def given(self) -> dict[str, Tensor]:
        most = max(self.tiles)
        if not most:
            return {}
        pixels = self.noise(len(self.tiles), most, 3, self.size, self.size)
        there = torch.arange(most) < torch.tensor(self.tiles)[:, None]
        mask = there[:, :, None, None].expand(-1, -1, self.size, self.size)
        return {"pixel_values": pixels * mask[:, :, None], "pixel_attention_mask": mask.long()}


class Whole(Family):
    """Gemma 3: every image is as large, and token types say where it stands."""

    images = 0

    def image(self, draw: random.Random) -> tuple[int, list[tuple[int, int, int]]]:
        self.images += 1
        side = int(self.config.mm_tokens_per_image**0.5)
        return self.config.image_token_id, self.raster(side, side)

    def given(self) -> dict[str, Tensor]:
        size = self.config.vision_config.image_size
        return {"pixel_values": self.noise(self.images, 3, size, size)} if self.images else {}


class Grids(Family):
    """Qwen2-VL: an image of any even grid of patches, a video of some frames."""

    def __init__(self, model: Any, seed: int) -> None:
        super().__init__(model, seed)
        self.grids: dict[str, list[list[int]]] = {"image": [], "video": []}

    def image(self, draw: random.Random) -> tuple[int, list[tuple[int, int, int]]]:
        return self._seen("image", 1, draw)

    def video(self, draw: random.Random) -> tuple[int, list[tuple[int, int, int]]]:
        return self._seen("video", draw.randrange(1, 4), draw)

    def _seen(self, kind: str, frames: int, draw: random.Random) -> tuple[int, list[tuple[int, int, int]]]:
        rows, columns = draw.randrange(1, 6), draw.randrange(1, 6)
        self.grids[kind].append([frames, 2 * rows, 2 * columns])
        places = [place for _ in range(frames) for place in self.raster(rows, columns)]
        return getattr(self.config, f"{kind}_token_id"), places

    def given(self) -> dict[str, Tensor]:
        vision, found = self.config.vision_config, {}
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            grids = torch.tensor(self.grids[kind])
            if len(grids):
                found |= {pixels: self.noise(int(grids.prod(1).sum()), size), f"{kind}_grid_thw": grids}
        return found


FAMILIES: dict[str, Callable[[Any, int], Any]] = {
    "internvl": Tiles,
    "qwen2_vl": Grids,
    "smolvlm": PaddedTiles,
    "idefics3": PaddedTiles,
    "gemma3": Whole,
}
