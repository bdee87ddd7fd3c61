"""Which visual tokens stay: places in the prompt, and masks over an image's grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from foveate.ir.program import ModelInfo, outputs
from foveate.models.registry import FAMILIES
from foveate.ops import PAD


def kept_places(model: Any, inputs: Mapping[str, Any]) -> dict[int, list[list[int]]]:
    """For each layer before which tokens are selected, the places in each prompt that stay; maybe none.

    What the vision tower leaves is that of layer 0. Runs one prefill of an `OptimizedModel`, if its program selects.
    """
    if not outputs(model.program.prefill)["kept"] and not model.program.shortens:
        return {}
    kept = model(**inputs, use_cache=False).kept or {}
    return {layer: [[int(p) for p in row if p != PAD] for row in places] for layer, places in kept.items()}


def kept_masks(about: ModelInfo, inputs: Mapping[str, Any], places: Sequence[int]) -> list[list[list[bool]]]:
    """For each image, tile or frame of one prompt, over its grid: which of its tokens are in `places`.

    inputs: what the processor made of that prompt alone.
    """
    ids = inputs["input_ids"]
    image = about.visual(ids)
    layout = FAMILIES[about.family].layout(about, inputs, ids[image], None)
    stay = torch.isin(image[0].nonzero().flatten(), torch.tensor(list(places), dtype=torch.int64))
    units = layout.coords[:, 0]
    sizes: list[list[int] | None] = layout.sizes.tolist() if layout.sizes is not None else [None] * len(units.unique())
    masks = []
    for unit, size in enumerate(sizes):
        mine = (units == unit) & layout.patch
        where = layout.coords[mine, 1:]
        mask = torch.zeros(*(size or (where.amax(0) + 1).tolist()), dtype=torch.bool)
        mask[where[:, 0], where[:, 1]] = stay[mine]
        masks.append(mask.tolist())
    return masks
