"""What the papers do to the visual tokens of a LLaVA before its decoder, by the Hugging Face modules and plain lists.

An image's tokens are `Tokens`: features that the projector is given, and the place on the grid that each stands for.
`shortened` runs a model on such tokens: the prompt has as many image tokens as are left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate.kernels import reference


@dataclass(frozen=True)
class Tokens:
    """Of one image: features [k, C or D] and the places they stand for (-1: none)."""

    features: Tensor
    source: list[int]


@dataclass(frozen=True)
class Seen:
    """What the tower saw of all images: features [I, 1 + N, C] behind the feature layer, the attention [I, H, 1 + N,
    1 + N] and the keys [I, 1 + N, C] of the layer before them, and `model`."""

    model: Any
    features: Tensor
    attention: Tensor
    keys: Tensor

    @property
    def row(self) -> Tensor:
        """What CLS pays to each patch, summed over heads."""
        return self.attention[:, :, 0, 1:].sum(1)


Method = Callable[[Seen], list[Tokens]]


@contextmanager
def _eager(model: Any) -> Iterator[None]:
    config = model.model.vision_tower.config
    before = config._attn_implementation
    config._attn_implementation = "eager"
    try:
        yield
    finally:
        config._attn_implementation = before


def _layers(model: Any) -> Any:
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower).encoder.layers


def see(model: Any, pixel_values: Tensor) -> Seen:
    """Run the tower with attention matrices."""
    layer = range(len(_layers(model)) + 1)[model.config.vision_feature_layer] - 1
    keys: list[Tensor] = []
    hook = _layers(model)[layer].self_attn.k_proj.register_forward_hook(lambda m, i, out: keys.append(out))
    with _eager(model):
        out = model.model.vision_tower(pixel_values, output_hidden_states=True, output_attentions=True)
    hook.remove()
    return Seen(model, out.hidden_states[layer + 1], out.attentions[layer], keys[0])


def best(scores: Tensor, keep: float) -> list[list[int]]:
    """For each image the places of its floor(keep * n) best tokens, in order."""
    count = int(keep * scores.shape[1])
    ranked = [sorted(range(len(row)), key=lambda j: (-row[j], j)) for row in scores.tolist()]
    return [sorted(order[:count]) for order in ranked]


def fastervlm(keep: float) -> Method:
    """By the CLS row."""
    return lambda seen: [Tokens(seen.features[i, 1:][places], places) for i, places in enumerate(best(seen.row, keep))]


def vispruner(keep: float, important: float = 0.5) -> Method:
    """By the CLS row, and by difference."""

    def method(seen: Seen) -> list[Tokens]:
        chosen = reference.distinct_scores(seen.row, seen.features[:, 1:], keep, important)
        return [Tokens(seen.features[i, 1:][places], places) for i, places in enumerate(best(chosen, keep))]

    return method


def visionzip(dominant: int, contextual: int) -> Method:
    """Dominant and contextual tokens."""

    def method(seen: Seen) -> list[Tokens]:
        heads = seen.attention.shape[1]
        metric = seen.keys[:, 1:].unflatten(2, (heads, -1)).mean(2)
        weights, source = reference.visionzip(seen.row, metric, dominant - 1, contextual)
        return [
            Tokens(torch.cat([seen.features[i, :1], weights[i] @ seen.features[i, 1:]]), [-1, *source[i].tolist()])
            for i in range(len(source))
        ]

    return method


def prumerge(keep: float | None = None, plus: bool = False, neighbors: int = 32) -> Method:
    """Tokens that stand out, and those merged into them."""

    def method(seen: Seen) -> list[Tokens]:
        behind = range(len(_layers(seen.model)) + 1)[seen.model.config.vision_feature_layer]
        layer = _layers(seen.model)[behind]
        hidden = layer.layer_norm1(seen.features)
        query, key = layer.self_attn.q_proj(hidden[:, :1]), layer.self_attn.k_proj(hidden)
        row = (query @ key.transpose(1, 2) * key.shape[2] ** -0.5).softmax(-1)[:, 0, 1:]
        found = reference.prumerge(row, key[:, 1:], keep, plus, neighbors)
        return [Tokens(weights @ seen.features[i, 1:], source) for i, (weights, source) in enumerate(found)]

    return method


def average_pool(factor: int) -> Method:
    """Means over squares."""

    def method(seen: Seen) -> list[Tokens]:
        side = int((seen.features.shape[1] - 1) ** 0.5)
        image = seen.features[:, 1:].transpose(1, 2).unflatten(2, (side, side))
        pooled = torch.nn.functional.avg_pool2d(image, factor).flatten(2).transpose(1, 2)
        corners = range(0, side, factor)
        return [Tokens(x, [row * side + column for row in corners for column in corners]) for x in pooled]

    return method


def projected(model: Any, tokens: list[Tokens]) -> list[Tokens]:
    """Through the projector."""
    return [Tokens(model.model.multi_modal_projector(x.features), x.source) for x in tokens]


def divprune(model: Any, tokens: list[Tokens], keep: float) -> list[Tokens]:
    """Of projected tokens, those that differ most."""
    found = []
    for x in tokens:
        (places,) = best(reference.diverse_scores(x.features[None], keep), keep)
        found.append(Tokens(x.features[places], [x.source[j] for j in places]))
    return found


def cdpruner(
    model: Any, seen: Seen, keep: float, clip: Any, questions: Tensor | None, theta: float | None = None
) -> list[Tokens]:
    """CDPruner: a greedy walk over determinants of relevance times likeness; clip: the `CLIPModel` of the tower."""
    found = []
    for image, features in enumerate(seen.features):
        (whole,) = projected(model, [Tokens(features[1:], list(range(len(features) - 1)))])
        relevance = torch.ones(1, len(whole.source))
        if questions is not None:
            own = clip.visual_projection(clip.vision_model.post_layernorm(features[1:].float()))
            cosine = torch.nn.functional.normalize(own, dim=-1) @ questions[image]
            values = -cosine
            relevance = ((values - values.min() + 1e-6) / (values.max() - values.min() + 1e-6))[None]
        scores = reference.determinant_scores(whole.features[None].detach(), relevance.detach(), keep, theta)[0]
        ranked = sorted(range(len(whole.source)), key=lambda j: (-float(scores[j]), j))
        places = sorted(ranked[: math.floor(keep * len(whole.source))])
        found.append(Tokens(whole.features[places], places))
    return found


@dataclass(frozen=True)
class Short:
    """A batch whose images have become fewer tokens.

    inputs: padded on the left; given to the model inside `showing(model, tokens)`. places: for each row, the place in
    the whole prompt of each token that is left, or of the image token that it stands for (None for CLS).
    """

    inputs: dict[str, Tensor]
    places: list[list[int | None]]


def shorten(model: Any, inputs: Mapping[str, Tensor], tokens: list[Tokens], per_image: int = 0) -> Short:
    """Remove the image tokens that are not needed any more from the prompts.

    per_image: how many an image has; as many as the tower has patches where not given.
    """
    ids = inputs["input_ids"]
    attended = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    remaining = iter(tokens)
    rows: list[list[int]] = []
    places: list[list[int | None]] = []
    for row, real in zip(ids, attended, strict=True):
        kept: list[int | None] = []
        whole = [j for j in range(len(row)) if row[j] == model.config.image_token_id]
        if not per_image:
            per_image = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
        starts = set(whole[::per_image])
        for j in real.nonzero()[:, 0].tolist():
            if j in starts:
                kept += [None if place < 0 else j + place for place in next(remaining).source]
            elif j not in whole:
                kept.append(j)
        places.append(kept)
        rows.append([model.config.image_token_id if j is None else int(row[j]) for j in kept])
    width = max(map(len, rows))
    padding = [width - len(row) for row in rows]
    short = {
        "input_ids": torch.tensor([[0] * n + row for n, row in zip(padding, rows, strict=True)]),
        "attention_mask": torch.tensor([[0] * n + [1] * len(row) for n, row in zip(padding, rows, strict=True)]),
    }
    if "pixel_values" in inputs:
        short["pixel_values"] = inputs["pixel_values"]
    return Short(short, [[None] * n + list(row) for n, row in zip(padding, places, strict=True)])


@contextmanager
def showing(model: Any, tokens: list[Tokens]) -> Iterator[None]:
    """While open, the model takes these projected tokens for its images, whatever pixels it is given."""
    inner = model.model
    features = BaseModelOutputWithPooling(pooler_output=[x.features for x in tokens])
    inner.get_image_features = lambda *args, **options: features
    try:
        yield
    finally:
        del inner.get_image_features
