"""What a model family has to say: `Family`, of which `foveate.models.registry.FAMILIES` holds one object a family."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.ir.layout import Layout
from foveate.ir.program import ModelInfo
from foveate.models.decoder import Decoder
from foveate.models.recording import Inputs, Size, Wrapper

Given = Mapping[str, Tensor]
"""What a processor made beside input ids and attention mask, by name; only what is there."""


class Family(ABC):
    """How models of a family become graphs, and how what their processor makes becomes inputs of these.

    vision: a module around a model, from pixels to visual embeddings. decoder: one from embeddings and positions to
    logits. takes: what a family takes of its processor beside input ids and attention mask. position_axes: axes of
    position ids before [batch, sequence]. whole_images: whether an image's tokens see each other, those behind them
    too, or layers see a window only.
    """

    vision: ClassVar[type[Wrapper]]
    decoder: ClassVar[type[Wrapper]] = Decoder
    takes: ClassVar[tuple[str, ...]]
    position_axes: ClassVar[tuple[int, ...]] = ()
    whole_images: ClassVar[bool] = False

    @abstractmethod
    def describe(self, config: Any) -> ModelInfo:
        """Sizes, token ids and names of weights of a model with this configuration.

        Raises UnsupportedModelError, with what is supported, for one that is not.
        """

    @abstractmethod
    def vision_inputs(self, info: ModelInfo, size: Size) -> Inputs:
        """Inputs of `vision`."""

    @abstractmethod
    def tower_layers(self, model: Any) -> int:
        """How many tower layers the features need."""

    @abstractmethod
    def vision_given(self, info: ModelInfo, given: Given) -> dict[str, Tensor] | None:
        """What the vision graph takes, by name, or None where there is no image; InputError for what does not fit."""

    @abstractmethod
    def layout(self, info: ModelInfo, given: Given, kinds: Tensor, out: Given | None) -> Layout:
        """What stands at the image and video tokens `kinds` [P], of which the vision graph made `out`.

        out None: of which nothing is made, so that all places are filled. Raises InputError where images and videos
        are not as many as the prompts say.
        """

    def positions(self, info: ModelInfo, given: Given, ids: Tensor, real: Tensor) -> Tensor | None:
        """Position ids of prompts [B, S], where they are not the numbers of the tokens before. real: no padding."""
        return None

    @abstractmethod
    def images_in(self, info: ModelInfo, given: Given, ids: Tensor) -> dict[str, list[int]]:
        """How many rows of what is given belong to each prompt of ids [B, S], by name."""

    @abstractmethod
    def pictures(self, info: ModelInfo, given: Given) -> list[Tensor]:
        """Pixels [3, height, width] of each image, tile or frame, as the tower sees them."""

    @abstractmethod
    def sample(self, info: ModelInfo, images: int, generator: torch.Generator) -> tuple[list[int], dict[str, Tensor]]:
        """Random images: how many tokens each becomes, and what a processor would make of them."""
