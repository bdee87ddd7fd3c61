"""Qwen3-VL: a tower that gives features of several depths, which a Qwen3 decoder adds to visual tokens (DeepStack).

    h = layer 0(h);  h[visual] += deepstack[0]      h = layer 0(h);  h = h + deepstack[..., 0, :]      zero for text
    h = layer 1(h);  h[visual] += deepstack[1]      h = layer 1(h);  h = h + deepstack[..., 1, :]

The decoder's loop is written out here, because transformers looks for visual tokens with a mask whose result has a size
of its own. As a value of every token, `deepstack` is split, gathered and joined like any other: after a selection the
tokens that stay take their own features along.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import UnsupportedModelError
from foveate.ir.program import ModelInfo
from foveate.models import packed
from foveate.models.family import Given
from foveate.models.packed import Packed
from foveate.models.recording import Inputs, Size, Wrapper


class Vision(Wrapper):
    """Packed patches [n, values of a patch] of all images to visual embeddings [m, hidden size], m tokens of n patches.

    patch_positions, cu_seqlens: as for Qwen2-VL. interp_indices int64 and interp_weights fp32 [n, 4]: which learned
    positions surround each patch on the grid of those, and their shares. Returns also the features [m, levels, hidden
    size] that belong behind the first decoder layers, if there are any.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.levels = _levels(model.config)

    def forward(
        self,
        pixel_values: Tensor,
        patch_positions: Tensor,
        cu_seqlens: Tensor,
        interp_indices: Tensor,
        interp_weights: Tensor,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Tower and mergers."""
        given = {"position_ids": patch_positions, "cu_seqlens": cu_seqlens, "max_seqlen": 1}
        given |= {"interp_indices": interp_indices, "interp_weights": interp_weights}
        made = self.model.model.visual(pixel_values, grid_thw=None, **given)
        features = made.pooler_output
        assert isinstance(features, Tensor)  # the merger is a plain module
        if not self.levels:
            return features
        return features, torch.cat([level[:, None] for level in made.deepstack_features[: self.levels]], dim=1)


class Decoder(Wrapper):
    """Embeddings [B, S, D], positions [3, B, S], features [B, S, levels, D] to logits [B, 1, V] of the next token."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.rotary_emb = _Rotary(_section(model.config.text_config))
        # Their paths say which layer each addition belongs to.
        self.layers = nn.ModuleList(
            nn.ModuleDict({"deepstack": _Added(level)}) for level in range(_levels(model.config))
        )

    def forward(self, hidden: Tensor, position_ids: Tensor, deepstack: Tensor | None = None) -> Tensor:
        """Decoder layers and additions between them, final norm, head."""
        decoder = self.model.model.language_model
        rotary = decoder.rotary_emb
        angles = self.rotary_emb(position_ids, rotary.inv_freq, rotary.attention_scaling, hidden.dtype)
        for number, layer in enumerate(decoder.layers):
            hidden = layer(hidden, attention_mask=None, position_embeddings=angles)
            if number < len(self.layers):
                hidden = self.layers.get_submodule(f"{number}.deepstack")(hidden, deepstack)
        logits = self.model.lm_head(decoder.norm(hidden)[:, -1:])
        assert isinstance(logits, Tensor)  # the head is a plain linear
        return logits


class _Added(nn.Module):
    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level

    def forward(self, hidden: Tensor, deepstack: Tensor) -> Tensor:
        return hidden + deepstack[:, :, self.level]


class _Rotary(nn.Module):
    """Interleaved M-RoPE: frequencies take turns between time, row and column; what is left over is time's."""

    def __init__(self, section: int) -> None:
        super().__init__()
        self.turns = 3 * section

    def forward(
        self, positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, S, head size] of positions [3, B, S], written without assigning to slices."""
        time, row, column = (positions[axis][..., None].float() for axis in range(3))
        taken = [each * frequencies[axis : self.turns : 3] for axis, each in enumerate((time, row, column))]
        angles = torch.cat([each[..., None] for each in taken], dim=-1).flatten(-2)
        if self.turns < frequencies.shape[0]:
            angles = torch.cat([angles, time * frequencies[self.turns :]], dim=-1)
        angles = torch.cat([angles, angles], dim=-1)
        cosine, sine = angles.cos(), angles.sin()
        if scale != 1:
            cosine, sine = cosine * scale, sine * scale
        return cosine.to(dtype), sine.to(dtype)


class Qwen3VL(Packed):
    """Qwen3-VL, with DeepStack."""

    vision = Vision
    decoder = Decoder

    def vision_inputs(self, info: ModelInfo, size: Size) -> Inputs:
        """Those of Qwen2-VL, and the learned positions around each patch."""
        return {
            **super().vision_inputs(info, size),
            "interp_indices": ((size("patches"), 4), torch.int64),
            "interp_weights": ((size("patches"), 4), torch.float32),
        }

    def describe(self, config: Any) -> ModelInfo:
        """Sizes and names of a Qwen3-VL with this configuration.

        Raises UnsupportedModelError as for Qwen2-VL, and for frequencies that rows and columns do not share evenly.
        """
        _section(config.text_config)
        return packed.about(config, family="qwen3_vl", deepstack=_levels(config))

    def vision_given(self, info: ModelInfo, given: Given) -> dict[str, Tensor] | None:
        """As for Qwen2-VL, and the learned positions around each patch."""
        found = super().vision_given(info, given)
        if found is None:
            return None
        places = found["patch_positions"]
        tokens = torch.cat([packed.token_grids(info, given, name) for _, name in packed.KINDS])
        frames = packed.frames_of(tokens).to(places.device) * packed.merge_of(info)
        sizes = frames.repeat_interleave(frames.prod(1), dim=0)
        side = int(info.config["vision_config"]["num_position_embeddings"] ** 0.5)
        (rows, down), (columns, across) = (_neighbors(places[:, i], sizes[:, i], side) for i in range(2))
        return {
            **found,
            "interp_indices": (rows[:, :, None] * side + columns[:, None]).flatten(1),
            "interp_weights": (down[:, :, None] * across[:, None]).flatten(1),
        }

    def positions(self, info: ModelInfo, given: Given, ids: Tensor, real: Tensor) -> Tensor:
        """Positions int64 [3, B, S]: see `foveate.models.packed.mrope`; each frame of a video is a block of its own.

        The prompt says in words when a frame was, between the frames.
        """
        images, videos = (packed.token_grids(info, given, name) for _, name in packed.KINDS)
        return packed.mrope(
            info,
            ids,
            real,
            [(range(frames), height, width) for frames, height, width in images.tolist()],
            [((0,), height, width) for height, width in packed.frames_of(videos).tolist()],
        )


def _levels(config: Any) -> int:
    """How many features of DeepStack the decoder adds: one for each tower layer that gives some, while layers last."""
    vision = config.vision_config
    given = {number for number in vision.deepstack_visual_indexes if 0 <= number < vision.depth}
    return min(len(given), int(config.text_config.num_hidden_layers))


def _section(text: Any) -> int:
    """How many frequencies rows have, and columns; UnsupportedModelError where they are not equally many."""
    _, rows, columns = section = (text.rope_parameters or {}).get("mrope_section", [24, 20, 20])
    if rows != columns or 6 * rows > text.head_dim:
        raise UnsupportedModelError(
            f"mrope_section {list(section)} is not supported for heads of {text.head_dim}; rows and columns must have "
            "equally many frequencies, and take turns with time"
        )
    return int(rows)


def _neighbors(place: Tensor, count: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Two of `side` learned positions around each place of `count`, int64 [n, 2], and their shares, fp32 [n, 2].

    The first and the last place stand on the first and the last learned position, as in bilinear interpolation with
    aligned corners.
    """
    at = place.float() * (side - 1) / (count - 1).clamp(min=1)
    below = at.floor()
    step = torch.arange(2, device=place.device)
    shares = (1 - (at[:, None] - below[:, None] - step).abs()).clamp(min=0)
    return (below.long()[:, None] + step).clamp(max=side - 1), shares
