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
from tests.oracle.anyres import packed, tiles_of

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
        family.begin(counts)
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

    def begin(self, counts: list[int]) -> None:
        """A prompt with so many images and videos comes next."""

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

    def begin(self, counts: list[int]) -> None:
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


class OneSize(Family):
    """LLaVA: every image is as large, a token a patch."""

    images = 0

    @property
    def side(self) -> int:
        return int(self.config.vision_config.image_size // self.config.vision_config.patch_size)

    def image(self, draw: random.Random) -> tuple[int, list[tuple[int, int, int]]]:
        self.images += 1
        return self.config.image_token_id, self.raster(self.side, self.side)

    def given(self) -> dict[str, Tensor]:
        size = self.config.vision_config.image_size
        return {"pixel_values": self.noise(self.images, 3, size, size)} if self.images else {}


class Whole(OneSize):
    """Gemma 3: the same, pooled, and token types say where an image stands."""

    @property
    def side(self) -> int:
        return int(self.config.mm_tokens_per_image**0.5)


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


class Detailed(Family):
    """LLaVA-NeXT: an image of any size, of which transformers tells what becomes of its tiles."""

    def __init__(self, model: Any, seed: int) -> None:
        super().__init__(model, seed)
        self.model, vision = model, model.config.vision_config
        self.size, self.side = vision.image_size, vision.image_size // vision.patch_size
        self.sizes: list[list[int]] = []
        self.tiles: list[int] = []

    def image(self, draw: random.Random) -> tuple[int, list[tuple[int, int, int]]]:
        self.sizes.append([draw.randrange(1, 100), draw.randrange(1, 100)])
        return self.config.image_token_id, self.places(self.sizes[-1])

    def places(self, size: list[int]) -> list[tuple[int, int, int]]:
        self.tiles.append(tiles_of(self.model, size))
        places = [self.raster(self.side, self.side) for _ in range(self.tiles[-1])]
        found = packed(self.model, torch.tensor(places).float(), size, torch.full((3,), -1.0)).int().tolist()
        return [(unit, row, column) for unit, row, column in found]

    def given(self) -> dict[str, Tensor]:
        if not self.sizes:
            return {}
        # What pads the images of fewer tiles is noise too, which must not matter.
        pixels = self.noise(len(self.tiles), max(self.tiles), 3, self.size, self.size)
        return {"pixel_values": pixels, "image_sizes": torch.tensor(self.sizes)}


class OneVision(Detailed):
    """LLaVA-OneVision: several images of a prompt are not cut, one with many tiles is shrunk; frames are pooled."""

    def __init__(self, model: Any, seed: int) -> None:
        super().__init__(model, seed)
        self.groups: list[int] = []
        self.videos, self.frames = 0, 1 + seed % 3

    def begin(self, counts: list[int]) -> None:
        self.groups += counts[:1] if counts[0] else []

    def places(self, size: list[int]) -> list[tuple[int, int, int]]:
        if self.groups[-1] > 1:
            self.tiles.append(1)
            return [*self.raster(self.side, self.side), (-1, -1, -1)]
        tiles = torch.zeros(tiles_of(self.model, size), self.side**2, 1)
        marks, all_marks = (packed(self.model, tiles, size, torch.ones(1), ratio) for ratio in ("", "anyres_max_999"))
        if len(marks) == len(all_marks):
            return super().places(size)
        self.tiles.append(len(tiles))
        places, rows = self.raster(self.side, self.side), int(marks.sum())
        columns, unit = (len(marks) - len(places)) // rows - 1, next(self.units)
        for row in range(rows):
            places += [*((unit, row, column) for column in range(columns)), (-1, -1, -1)]
        return places

    def video(self, draw: random.Random) -> tuple[int, list[tuple[int, int, int]]]:
        self.videos += 1
        side = (self.side + 1) // 2
        places = [place for _ in range(self.frames) for place in self.raster(side, side)]
        return self.config.video_token_id, [*places, (-1, -1, -1)]

    def given(self) -> dict[str, Tensor]:
        found = super().given()
        if found:
            found["batch_num_images"] = torch.tensor(self.groups)
        if self.videos:
            found["pixel_values_videos"] = self.noise(self.videos, self.frames, 3, self.size, self.size)
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
        return token, [place for frame in frames for place in (*frame, None)]


FAMILIES: dict[str, Callable[[Any, int], Any]] = {
    "internvl": Tiles,
    "qwen2_vl": Grids,
    "llava": OneSize,
    "llava_next": Detailed,
    "llava_onevision": OneVision,
    "qwen2_5_vl": Timed,
    "qwen3_vl": Told,
    "qwen3_vl_moe": Told,
    "smolvlm": PaddedTiles,
    "idefics3": PaddedTiles,
    "gemma3": Whole,
}
