"""What to hide from a model: the dataclasses of the masked oracle, and what they must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Before:
    """What a choice may look at, before a layer.

    hidden [B, S, D]: what enters it, and `embeddings` what entered the first. weights [B, H, S, S] and keys [B, H, S,
    E] of the layer before (keys repeated for each query head). alive, visual, text: bool [B, S], the visual tokens
    that are left, all of them, and the text; reaching: those that were left as each layer up to now found them.
    """

    hidden: Tensor
    embeddings: Tensor
    weights: Tensor
    keys: Tensor
    alive: Tensor
    visual: Tensor
    text: Tensor
    reaching: dict[int, Tensor]


Choice = Callable[[Before], tuple[Tensor, Tensor | None]]
"""The visual tokens that stay, bool [B, S], and weights [B, S, S], if any, of the hidden states that enter a layer."""


@dataclass(frozen=True)
class Prune:
    """Before `layer`, keep floor(keep * n) of the n visual tokens of a row that are still alive.

    `choose="fastv"` keeps those on which the last text token's attention in `layer - 1` is largest: the
    mean over all query heads of the row that was softmaxed over every visible key. `choose="given"`
    keeps the best by `given`, which holds either scores [B, most visual tokens of a row], in the order
    of the tokens, or a bool mask [B, S] that is True on the tokens to keep (`keep` is then not read,
    and what it says of text is ignored). `choose="pyramid"` goes by the same row as "fastv", but of `layer` itself, in
    which all of them are still visible, and `keep` is a share of the tokens that reach the layer `of`. `choose="by"`
    asks `by`. `mix` [B, S, S] are weights by which hidden states are summed that enter the layer. Ties go to the token
    that comes first.
    """

    layer: int
    keep: float
    choose: Literal["fastv", "pyramid", "given", "by"]
    given: Tensor | None = None
    of: int = 0
    by: Choice | None = None
    mix: Tensor | None = None


@dataclass(frozen=True)
class Neighbors:
    """Visual queries see visual keys of their own image within `radius`, and no others.

    grid: rows and columns of an image's tokens, which stand row by row. `metric`: of the distance on the grid,
    "raster" for that in the sequence. `causal`: no later key either. `see_prefix`: earlier text is seen.
    `layers`: where (None: in all). `coords`, int64 [B, S, 3]: image, row and column of each visual token, where they
    are not those of whole images.
    """

    grid: tuple[int, int]
    radius: int
    metric: Literal["chebyshev", "euclidean", "raster"] = "chebyshev"
    causal: bool = False
    see_prefix: bool = True
    layers: tuple[int, ...] | None = None
    coords: Tensor | None = None


@dataclass(frozen=True)
class Masks:
    """What to hide from the model; the default hides nothing.

    - `cut_from`: text queries in layers >= `cut_from` see text keys only.
    - `heads`: bool [L, H], True = kept. In a dropped head text queries see text keys only, and the
      head's output is zero on visual rows. Without `renorm` the softmax of text queries is over every key, and what
      they then pay to visual keys is set to zero.
    - `neurons`: bool [L, intermediate], True = kept for visual rows.
    - `prunes`: visual tokens removed as keys, for every query, from a layer on.
    - `neighbors`: visual queries look at their surroundings only.

    Tokens keep their positions.
    """

    cut_from: int | None = None
    heads: Tensor | None = None
    neurons: Tensor | None = None
    prunes: tuple[Prune, ...] = ()
    neighbors: Neighbors | None = None
    renorm: bool = True


def check(config: Any, masks: Masks, attended: Tensor, visual: Tensor) -> None:
    """Raise ValueError where masks do not fit a decoder's configuration, or a prompt."""
    layers = int(config.num_hidden_layers)
    if masks.cut_from is not None and not 0 <= masks.cut_from <= layers:
        raise ValueError(f"cut_from must be in 0..{layers}, got {masks.cut_from}")
    _check_mask("heads", masks.heads, (layers, int(config.num_attention_heads)))
    _check_mask("neurons", masks.neurons, (layers, int(config.intermediate_size)))
    for prune in masks.prunes:
        _check_prune(prune, layers, visual)
    layers_of_prunes = [prune.layer for prune in masks.prunes]
    if layers_of_prunes != sorted(layers_of_prunes):
        raise ValueError(f"prunes must come in the order of their layers, got {layers_of_prunes}")
    if not bool(attended.any(dim=1).all()):
        raise ValueError("a row without any attended token")
    removes = bool(masks.prunes) or (masks.cut_from is not None and masks.cut_from < layers)
    ends_visual = visual.gather(1, last_place(attended)[:, None])
    if removes and bool(ends_visual.any()):
        raise ValueError("a row ends with a visual token, whose own logits the masks would take away")


def _check_mask(name: str, mask: Tensor | None, shape: tuple[int, int]) -> None:
    if mask is not None and (mask.dtype != torch.bool or tuple(mask.shape) != shape):
        raise ValueError(f"{name} must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")


def _check_prune(prune: Prune, layers: int, visual: Tensor) -> None:
    first = 1 if prune.choose in ("fastv", "by") else 0
    if not first <= prune.layer < layers:
        raise ValueError(f"{prune.choose} prunes before the layers {first}..{layers - 1}, not {prune.layer}")
    if not 0 <= prune.keep <= 1:
        raise ValueError(f"keep must be in [0, 1], got {prune.keep}")
    for name in ("given", "by"):
        if (prune.choose == name) != (getattr(prune, name) is not None):
            raise ValueError(f"`{name}` goes with choose='{name}' and with nothing else")
    if prune.given is None:
        return
    wanted = tuple(visual.shape)
    if prune.given.dtype != torch.bool:
        wanted = (wanted[0], int(visual.sum(dim=1).max()))
    if tuple(prune.given.shape) != wanted:
        raise ValueError(f"`given` must have the shape {list(wanted)}, got {list(prune.given.shape)}")


def last_place(marked: Tensor) -> Tensor:
    """The last True place of each row of bool [B, S]: int64 [B]; 0 where there is none."""
    places = torch.arange(marked.shape[1], device=marked.device)
    return torch.where(marked, places, 0).amax(dim=1)
