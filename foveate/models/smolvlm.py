"""SmolVLM, SmolVLM2 and Idefics3: a SigLIP tower without CLS over tiles, pixel shuffling, a linear, a Llama decoder.

An image is one tile, or several in rows and columns and a small one of the whole; the words that say which is which
are plain text between them, and a video is frames, each of one tile. So tiles are all that is seen of either.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.errors import InputError, UnsupportedModelError
from foveate.ir.layout import Layout
from foveate.ir.program import ModelInfo
from foveate.models.decoder import PATHS, Decoder, common
from foveate.models.family import Given
from foveate.models.recording import Wrapper
from foveate.models.tiles import Tiles

OWN_PATHS = {name: path.replace("language_model", "text_model") for name, path in PATHS.items()}


class Vision(Wrapper):
    """Tiles [I, C, height, width] to visual embeddings [I, tokens per tile, hidden size]; a tile counts as an image."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.places = _places(_side(model.config.vision_config))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Tower, pixel shuffling, linear.

        The tower is called part by part, because its own call finds the positions in a mask of each tile's pixels,
        and they are the same for all tiles that are whole; others are refused.
        """
        inner = self.model.model
        tower = inner.vision_model
        patches = tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        hidden = patches + self._positions(tower.embeddings.position_embedding.weight)
        hidden = tower.encoder(inputs_embeds=hidden, attention_mask=None).last_hidden_state
        features = inner.connector(tower.post_layernorm(hidden))
        assert isinstance(features, Tensor)  # the connector is a plain module
        return features

    def _positions(self, table: Tensor) -> Tensor:
        """The embedding of each patch's position: [patches, C]."""
        side = len(self.places)
        if self.places == list(range(side)):
            return table
        rows = torch.cat([table[side * row : side * (row + 1)] for row in self.places]).unflatten(0, (side, side))
        return torch.cat([rows[:, place : place + 1] for place in self.places], 1).flatten(0, 1)


class TextModel(Decoder):
    """As in other families, under another name."""

    inside = "text_model"


class SmolVLM(Tiles):
    """SmolVLM and Idefics3.

    What they take is [B, tiles, ...], a row a prompt; rows with fewer tiles are filled up with tiles that are zero
    everywhere. It may be [tiles, ...] too, the tiles of all prompts one behind the other, as exported packages take it.
    """

    vision = Vision
    decoder = TextModel
    takes = ("pixel_values", "pixel_attention_mask")

    def describe(self, config: Any) -> ModelInfo:
        """Sizes and names of a SmolVLM or Idefics3 with this configuration.

        Raises UnsupportedModelError for a tower, decoder or rotary embedding that is not supported, and for tiles that
        cannot be shuffled.
        """
        text, vision, scale = config.text_config, config.vision_config, config.scale_factor
        name = {"smolvlm": "a SmolVLM", "idefics3": "an Idefics3"}[config.model_type]
        if vision.model_type not in ("smolvlm_vision", "idefics3_vision"):
            raise UnsupportedModelError(
                f"vision tower {vision.model_type!r} is not supported in {name}; smolvlm_vision and idefics3_vision are"
            )
        if text.model_type != "llama":
            raise UnsupportedModelError(f"decoder {text.model_type!r} is not supported in {name}; llama is")
        for size in ("image_size", "patch_size"):
            if not isinstance(getattr(vision, size), int):
                raise UnsupportedModelError(
                    f"{size} {getattr(vision, size)!r} is not supported in {name}; one number is"
                )
        side = _side(vision)
        if side % scale:
            raise UnsupportedModelError(
                f"a tile of {side} x {side} patches cannot be shuffled by {scale}; its side must be divisible"
            )
        return ModelInfo(
            family=config.model_type,
            **common(config, paths=OWN_PATHS),
            grid=(side // scale, side // scale),
            image_size=(vision.num_channels, vision.image_size, vision.image_size),
            uniform=True,
            tower="squares",
        )

    def vision_given(self, info: ModelInfo, given: Given) -> dict[str, Tensor] | None:
        """The tiles of all prompts that are not filling; InputError also for masks that hide a part of one."""
        return super().vision_given(info, _seen(info, given))

    def layout(self, info: ModelInfo, given: Given, kinds: Tensor, out: Given | None) -> Layout:
        """Tile by tile, row by row."""
        return super().layout(info, _seen(info, given), kinds, out)

    def pictures(self, info: ModelInfo, given: Given) -> list[Tensor]:
        """Each tile that is not filling."""
        return list(_seen(info, given).get("pixel_values", ()))

    def images_in(self, info: ModelInfo, given: Given, ids: Tensor) -> dict[str, list[int]]:
        """One, but of tiles that stand alone.

        Raises InputError where a prompt's row does not hold as many tiles as the prompt says.
        """
        pixels = given.get("pixel_values")
        if pixels is not None and pixels.dim() == 4:
            return super().images_in(info, given, ids)
        if pixels is not None:
            wanted = (info.visual(ids).sum(1) // info.tokens_per_image).tolist()
            found = _real(info, pixels).sum(1).tolist()
            if found != wanted:
                raise InputError(
                    f"the rows of pixel_values hold {found} tiles, and the prompts want {wanted}: give each prompt its "
                    "tiles in a row of its own"
                )
        return {name: [1] * len(ids) for name in given if name in self.takes}


def _seen(info: ModelInfo, given: Given) -> dict[str, Tensor]:
    """The tiles that the tower sees: `pixel_values` [I, C, height, width], if any are given."""
    pixels, mask = given.get("pixel_values"), given.get("pixel_attention_mask")
    if pixels is None:
        return {}
    if pixels.dim() not in (4, 5) or tuple(pixels.shape[-3:]) != info.image_size:
        sizes = ", ".join(map(str, info.image_size))
        raise InputError(
            f"pixel_values has shape {tuple(pixels.shape)}; this model takes [prompts, tiles of the longest, {sizes}], "
            f"or the tiles of all prompts [tiles, {sizes}]"
        )
    if mask is not None and mask.shape != (expected := (*pixels.shape[:-3], *pixels.shape[-2:])):
        raise InputError(
            f"pixel_attention_mask has shape {tuple(mask.shape)}; with these pixel_values it is {list(expected)}"
        )
    if pixels.dim() == 5:
        real = _real(info, pixels)
        pixels, mask = pixels[real], mask if mask is None else mask[real]
    if mask is not None:
        # What is left over at the right and at the bottom is in no patch.
        patch = int(info.config["vision_config"]["patch_size"])
        side = info.image_size[1] // patch
        shown = mask[:, : side * patch, : side * patch].bool().unflatten(2, (side, patch)).any(3)
        if not bool(shown.unflatten(1, (side, patch)).any(2).all()):
            raise InputError(
                "pixel_attention_mask hides a part of a tile; this model takes tiles that are whole, as its processor "
                "makes them"
            )
    return {"pixel_values": pixels}


def _real(info: ModelInfo, pixels: Tensor) -> Tensor:
    """Which tiles [B, tiles, C, height, width] are no filling: bool [B, tiles]."""
    real = pixels.flatten(2).any(2)
    if info.family == "smolvlm" and real.numel():
        # Where all are zero, SmolVLM of transformers sees the first, and Idefics3 none.
        real.view(-1)[0] |= ~real.any()
    return real


def _side(vision: Any) -> int:
    """Patches along a tile's side."""
    return int(vision.image_size // vision.patch_size)


def _places(side: int) -> list[int]:
    """Which row of the table of positions belongs to each of a whole tile's rows of patches; for columns the same.

    Positions are found by comparing fractions, i / side with multiples of 1 / side (NaViT, arXiv 2307.06304, as
    transformers does it), and not all of them come out exactly in fp32: of 19 rows some share a position.
    """
    step = 1 / side
    shares = (torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor([side]))).clamp(max=1 - 1e-6)
    found: list[int] = torch.bucketize(shares, torch.arange(step, 1.0, step), right=True).tolist()
    return found
