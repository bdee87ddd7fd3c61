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
        row, places = _text(model, draw, text), [(-1, -1, -1)] * text
        for kind in [kind for kind, count in enumerate(counts) for _ in range(count)]:
            token, found = family.image(draw) if kind == 0 else family.video(draw)
            words = _text(model, draw, draw.randrange(1, 4))
            shown = [token if place[0] >= 0 else _text(model, draw, 1)[0] for place in found]
            row, places = [*row, *shown, *words], [*places, *found, *[(-1, -1, -1)] * len(words)]
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
    return Made(inputs, torch.tensor(coords))


def _text(model: Any, draw: random.Random, length: int) -> list[int]:
    special = {getattr(model.config, f"{kind}_token_id", -1) for kind in ("image", "video")}
    words = [word for word in range(2, tiny.VOCAB) if word not in special]
    return [draw.choice(words) for _ in range(length)]


class Family:
    """What a batch's images are made of, one by one."""

    def __init__(self, model: Any, seed: int) -> None:
        self.config = model.config
        self.generator = torch.Generator().manual_seed(seed)
        self.units = itertools.count()

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


class Timed(Grids):
    """Qwen2.5-VL: a video also says how many seconds lie between its frames; whole ones, as older transformers take."""

    def given(self) -> dict[str, Tensor]:
        if not self.grids["video"]:
            return super().given()
        seconds = torch.randint(1, 4, (len(self.grids["video"]),), generator=self.generator).float()
        return {**super().given(), "second_per_grid_ts": seconds}


class Told(Grids):
    """Qwen3-VL: words between a video's frames say when they were."""

    def video(self, draw: random.Random) -> tuple[int, list[tuple[int, int, int]]]:
        token, places = super().video(draw)
        frames = [list(group) for _, group in itertools.groupby(places, key=lambda place: place[0])]
        return token, [place for frame in frames for place in (*frame, (-1, -1, -1))]


FAMILIES: dict[str, Callable[[Any, int], Any]] = {
    "internvl": Tiles,
    "qwen2_vl": Grids,
    "qwen2_5_vl": Timed,
    "qwen3_vl": Told,
}
