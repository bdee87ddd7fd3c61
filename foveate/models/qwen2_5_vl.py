"""Qwen2.5-VL: a tower whose patches attend within windows, and a Qwen2 decoder whose positions know a video's time.

The tower reorders its patches so that those of a window are neighbours, and orders them back at its end. No op between
but attention mixes patches, so here they come in that order, and the embeddings leave in it: the graph has no such
gathers, and where each embedding belongs is said by the layout, which has to say that anyway.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError, UnsupportedModelError
from foveate.ir.layout import Layout
from foveate.ir.program import ModelInfo
from foveate.models import packed
from foveate.models.family import Given
from foveate.models.packed import Packed
from foveate.models.recording import Inputs, Size, Wrapper

SECONDS = "second_per_grid_ts"
"""How many seconds lie between two of a video's frames: fp32 [videos]; one second where it is not given.

Fractions count, as in transformers 5.24; 5.17 still dropped them."""


class Vision(Wrapper):
    """Packed patches [n, values of a patch] of all images to visual embeddings [n / patches per token, hidden size].

    Both in the order of windows. patch_positions, cu_seqlens: as for Qwen2-VL, in that order. cu_window_seqlens: int32
    [windows + 1], where each window's patches begin and end.
    """

    def forward(
        self, pixel_values: Tensor, patch_positions: Tensor, cu_seqlens: Tensor, cu_window_seqlens: Tensor
    ) -> Tensor:
        """Tower and merger."""
        tower = self.model.model.visual
        hidden = tower.patch_embed(pixel_values)
        rotary = tower.rotary_pos_emb(hidden, patch_positions)
        whole = set(tower.fullatt_block_indexes)
        for number, block in enumerate(tower.blocks):
            bounds = cu_seqlens if number in whole else cu_window_seqlens
            # The longest segment is for flash kernels alone, which the recording does not call.
            hidden = block(hidden, cu_seqlens=bounds, max_seqlen=1, position_embeddings=rotary)
        features = tower.merger(hidden)
        assert isinstance(features, Tensor)  # the merger is a plain module
        return features


class Qwen25VL(Packed):
    """Qwen2.5-VL, whose patches come window by window."""

    vision = Vision
    takes = (*Packed.takes, SECONDS)

    def vision_inputs(self, info: ModelInfo, size: Size) -> Inputs:
        """Those of Qwen2-VL, and the windows."""
        return {**super().vision_inputs(info, size), "cu_window_seqlens": ((size("windows") + 1,), torch.int32)}

    def describe(self, config: Any) -> ModelInfo:
        """Sizes and names of a Qwen2.5-VL with this configuration.

        Raises UnsupportedModelError as for Qwen2-VL, and for windows that are smaller than a token.
        """
        made = packed.about(config, family="qwen2_5_vl")
        side = _window_side(made)
        if side < 1:
            raise UnsupportedModelError(
                f"window_size {config.vision_config.window_size} is less than the pixels of one visual token"
            )
        return replace(made, patches_per_window=side**2 * made.patches_per_token)

    def vision_given(self, info: ModelInfo, given: Given) -> dict[str, Tensor] | None:
        """As for Qwen2-VL, in the order of windows, and where each window begins and ends."""
        found = super().vision_given(info, given)
        if found is None:
            return None
        order, counts = _windows(info, given)
        within = torch.arange(info.patches_per_token)
        rows = (order[:, None] * info.patches_per_token + within).flatten().to(found["patch_positions"].device)
        bounds = torch.nn.functional.pad(counts.cumsum(0) * info.patches_per_token, (1, 0))
        return {
            "pixel_values": found["pixel_values"][rows],
            "patch_positions": found["patch_positions"][rows],
            "cu_seqlens": found["cu_seqlens"],
            "cu_window_seqlens": bounds.to(found["cu_seqlens"]),
        }

    def layout(self, info: ModelInfo, given: Given, kinds: Tensor, out: Given | None) -> Layout:
        """As for Qwen2-VL; the embeddings are those of windows."""
        made = super().layout(info, given, kinds, None)
        place = _windows(info, given)[0].argsort().to(kinds.device)
        return packed.left(replace(made, feature=place[made.feature]), out)

    def positions(self, info: ModelInfo, given: Given, ids: Tensor, real: Tensor) -> Tensor:
        """Positions int64 [3, B, S]: see `foveate.models.packed.mrope`; a video's frames stand at their times.

        Raises InputError for times that are not one a video.
        """
        images, videos = (packed.token_grids(info, given, name).tolist() for _, name in packed.KINDS)
        seconds = given.get(SECONDS, torch.ones(len(videos), dtype=torch.int64)).cpu()
        if seconds.dim() != 1 or len(seconds) != len(videos):
            raise InputError(
                f"{SECONDS} has shape {tuple(seconds.shape)}, and there are {len(videos)} videos in video_grid_thw: "
                "give one number a video, as the processor returns them"
            )
        rate = info.config["vision_config"]["tokens_per_second"]
        times = [(torch.arange(f) * (rate * s)).long().tolist() for (f, _, _), s in zip(videos, seconds, strict=True)]
        return packed.mrope(
            info,
            ids,
            real,
            [(range(frames), height, width) for frames, height, width in images],
            [(time, height, width) for time, (_, height, width) in zip(times, videos, strict=True)],
        )

    def images_in(self, info: ModelInfo, given: Given, ids: Tensor) -> dict[str, list[int]]:
        """As for Qwen2-VL; the seconds are those of the videos."""
        counts = super().images_in(info, given, ids)
        if SECONDS in given and "video_grid_thw" in counts:
            counts[SECONDS] = counts["video_grid_thw"]
        return counts


def _window_side(info: ModelInfo) -> int:
    """Visual tokens a side of a window."""
    vision = info.config["vision_config"]
    return int(vision["window_size"]) // int(vision["spatial_merge_size"]) // int(vision["patch_size"])


def _windows(info: ModelInfo, given: Given) -> tuple[Tensor, Tensor]:
    """The visual tokens window by window, as numbers in the usual order: int64 [n]; and how many each window holds.

    A frame is cut into windows from its upper left corner; the last ones of a row or column may be smaller.
    """
    side, start = _window_side(info), 0
    order, counts = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
    for _, grid_name in packed.KINDS:
        for height, width in packed.frames_of(packed.token_grids(info, given, grid_name)).tolist():
            row, column = torch.arange(height)[:, None] // side, torch.arange(width) // side
            window = (row * -(-width // side) + column).flatten()
            order.append(start + window.argsort(stable=True))
            counts.append(window.bincount())
            start += height * width
    return torch.cat(order), torch.cat(counts)
