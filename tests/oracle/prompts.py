"""What a prompt's positions hold, and the same prompt padded on the left or with a token more."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from tests.oracle.anyres import newlines
from tests.oracle.masks import Masks


@dataclass(frozen=True)
class Tokens:
    """What each position holds: both bool [B, S]. Padding is not attended; visual tokens are.

    blocks: int64 [B, S], the image whose tokens all see each other, -1 for none; for Gemma 3, by its own function.
    """

    attended: Tensor
    visual: Tensor
    blocks: Tensor | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tokens:
        ids = inputs["input_ids"]
        attended = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        types = inputs.get("token_type_ids")
        blocks = None if types is None else get_block_sequence_ids_for_mask(types)
        return cls(attended, attended & (kinds(model, ids) > 0) & ~newlines(model, inputs), blocks)


def kinds(model: Any, ids: Tensor) -> Tensor:
    """What each token is: 0 for text, 1 for an image's, 2 for a video's; int64 [B, S]."""
    image, video = (getattr(model.config, f"{kind}_token_id", -1) for kind in ("image", "video"))
    return (ids == image).long() + 2 * (ids == video)


def positions(model: Any, inputs: Mapping[str, Tensor], attended: Tensor) -> Tensor:
    """What transformers would count: for M-RoPE [3, B, S], by its own function."""
    if hasattr(model.model, "get_rope_index"):
        ids = inputs["input_ids"]
        grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        grids |= {name: inputs[name] for name in ("second_per_grid_ts",) if name in inputs}
        types = kinds(model, ids).int()
        found = model.model.get_rope_index(ids, mm_token_type_ids=types, attention_mask=attended.long(), **grids)
        return found[0]
    return (attended.long().cumsum(dim=1) - 1).clamp(min=0)


def left_padded(inputs: Mapping[str, Tensor], masks: Masks) -> tuple[dict[str, Tensor], Masks]:
    """The same rows with all padding on the left, so that new tokens can be put at the right end."""
    ids = inputs["input_ids"]
    attended = inputs.get("attention_mask", torch.ones_like(ids))
    order = attended.bool().long().argsort(dim=1, stable=True)

    def moved(tensor: Tensor) -> Tensor:
        return tensor.gather(1, order.to(tensor.device))

    new = {**inputs, "input_ids": moved(ids), "attention_mask": moved(attended)}
    if "token_type_ids" in inputs:
        new["token_type_ids"] = moved(inputs["token_type_ids"])
    return new, _with_given_masks(masks, moved)


def appended(inputs: Mapping[str, Tensor], masks: Masks, token: Tensor) -> tuple[dict[str, Tensor], Masks]:
    """The prompt with one more text token, int64 [B], in each row."""
    attended = inputs["attention_mask"]
    new = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], token[:, None]], dim=1),
        "attention_mask": torch.cat([attended, torch.ones_like(attended[:, :1])], dim=1),
    }
    if "position_ids" in inputs:
        places = inputs["position_ids"]
        behind = places.amax((0, 2), keepdim=True) + 1
        new["position_ids"] = torch.cat([places, behind.expand(len(places), -1, 1)], dim=2)
    if "token_type_ids" in inputs:
        new["token_type_ids"] = torch.nn.functional.pad(inputs["token_type_ids"], (0, 1))

    def extended(given: Tensor) -> Tensor:
        return torch.cat([given, torch.zeros_like(given[:, :1])], dim=1)

    masks = _with_given_masks(masks, extended)
    return new, replace(masks, prunes=tuple(replace(p, mix=_with_one_more(p.mix)) for p in masks.prunes))


def _with_one_more(mix: Tensor | None) -> Tensor | None:
    """Weights [B, S, S] for one more token, which is itself."""
    if mix is None:
        return None
    more = torch.nn.functional.pad(mix, (0, 1, 0, 1))
    more[:, -1, -1] = 1
    return more


def _with_given_masks(masks: Masks, change: Callable[[Tensor], Tensor]) -> Masks:
    """`masks` with `change` applied to what is aligned to the sequence: the given bool masks, and coordinates."""
    prunes = tuple(
        replace(p, given=change(p.given)) if p.given is not None and p.given.dtype == torch.bool else p
        for p in masks.prunes
    )
    near = masks.neighbors
    if near is not None and near.coords is not None:
        near = replace(near, coords=torch.stack([change(part) for part in near.coords.unbind(2)], 2))
    return replace(masks, prunes=prunes, neighbors=near)
