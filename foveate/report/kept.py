"""Which visual tokens stay: places in the prompt, and masks over an image's grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from foveate.ir.program import ModelInfo, outputs
from foveate.ops import PAD


def kept_places(model: Any, inputs: Mapping[str, Any]) -> dict[int, list[list[int]]]:
    """For each layer before which tokens are selected, the places in each prompt that stay; maybe none.

    What the vision tower leaves is that of layer 0. Runs one prefill of an `OptimizedModel`, if its program selects.
    """
    if not outputs(model.program.prefill)["kept"] and not model.program.shortens:
        return {}
    kept = model(**inputs, use_cache=False).kept or {}
    return {layer: [[int(p) for p in row if p != PAD] for row in places] for layer, places in kept.items()}


def kept_mask(about: ModelInfo, input_ids: torch.Tensor, places: Sequence[int], image: int = 0) -> list[list[bool]]:
    """Over the grid of one image of one prompt [S]: which of its tokens are in `places`."""
    rows, columns = about.grid
    visual = (input_ids == about.image_token_id).nonzero().flatten().tolist()
    mine = visual[image * about.tokens_per_image : (image + 1) * about.tokens_per_image]
    stay = set(places)
    return [[mine[row * columns + column] in stay for column in range(columns)] for row in range(rows)]
