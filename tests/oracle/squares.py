"""What selections do in towers that make a token of a square of patches, by transformers' own modules and plain lists.

A family says which module it calls for squares, and which parts of its projector follow the first product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.kernels import reference
from tests.oracle.vision import Tokens, best


@dataclass(frozen=True)
class Squares:
    """What a tower knows of all images: tokens [I, N, C] as the projector's first product reads them, how much
    attention each gets [I, N], mean over heads and with heads taken together, and keys [I, N, e] in both ways."""

    model: Any
    tokens: Tensor
    row: Tensor
    fused_row: Tensor
    keys: Tensor
    fused_keys: Tensor


def see(model: Any, pixel_values: Tensor) -> Squares:
    """Run the tower, and work out attention by the formula."""
    layer, reads = _modules(model)
    held: dict[str, Tensor] = {}
    hooks = [
        layer.q_proj.register_forward_hook(lambda m, i, out: held.update(q=out)),
        layer.k_proj.register_forward_hook(lambda m, i, out: held.update(k=out)),
        reads(lambda x: held.update(tokens=x)),
    ]
    model.model.get_image_features(pixel_values[None] if _nested(model) else pixel_values)
    for hook in hooks:
        hook.remove()
    heads = model.config.vision_config.num_attention_heads
    squares = _squares(model)
    has_cls = held["q"].shape[1] > squares.numel()
    found = []
    for count in (heads, 1):
        q, k = (held[name].unflatten(2, (count, -1)).transpose(1, 2) for name in "qk")
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(-1).mean(1)
        row, keys = (weights[:, 0, 1:], k[:, :, 1:]) if has_cls else (weights.mean(1), k)
        found += [row[:, squares].sum(2), keys.mean(1)[:, squares].mean(2)]
    return Squares(model, held["tokens"], found[0], found[2], found[1], found[3])


def _modules(model: Any) -> tuple[Any, Any]:
    """The attention of the tower's last layer, and what hooks into where the projector reads tokens."""
    inner = model.model
    if model.config.model_type in ("internvl", "llava"):
        encoder, reads = inner.vision_tower.encoder, inner.multi_modal_projector.linear_1
        own = model.config.model_type == "internvl"
        attention = encoder.layer[-1].attention if own else encoder.layers[-1].self_attn
        return attention, lambda f: reads.register_forward_pre_hook(lambda m, args: f(args[0]))
    if model.config.model_type == "gemma3":
        norm = inner.multi_modal_projector.mm_soft_emb_norm
        return inner.vision_tower.encoder.layers[-1].self_attn, lambda f: norm.register_forward_hook(
            lambda m, args, out: f(out)
        )
    proj = inner.connector.modality_projection.proj
    return inner.vision_model.encoder.layers[-1].self_attn, lambda f: proj.register_forward_pre_hook(
        lambda m, args: f(args[0])
    )


def _nested(model: Any) -> bool:
    return model.config.model_type in ("smolvlm", "idefics3")


def _squares(model: Any) -> Tensor:
    """For each token its patches: int64 [N, patches], by what the model itself does to a picture of their numbers."""
    config, inner = model.config, model.model
    side = (
        torch.tensor(config.vision_config.image_size).flatten()[0]
        // torch.tensor(config.vision_config.patch_size).flatten()[0]
    )
    numbers = torch.arange(int(side) ** 2, dtype=torch.float32)
    if config.model_type == "internvl":
        picture = numbers.view(1, int(side), int(side), 1)
        return inner.pixel_shuffle(picture, scale_factor=config.downsample_ratio).flatten(1, 2)[0].long()
    if config.model_type == "gemma3":
        kernel = inner.multi_modal_projector.kernel_size
        picture = numbers.view(1, 1, int(side), int(side))
        return torch.nn.functional.unfold(picture, kernel, stride=kernel)[0].T.long()
    if config.model_type == "llava":
        return numbers[:, None].long()
    return inner.connector.pixel_shuffle(numbers.view(1, -1, 1), config.scale_factor)[0].long()


def projected(model: Any, tokens: list[Tokens]) -> list[Tokens]:
    """Through the projector, from its first product on."""
    inner, family = model.model, model.config.model_type

    def project(x: Tensor) -> Tensor:
        if family in ("internvl", "llava"):
            own = inner.multi_modal_projector
            return own.linear_2(own.act(own.linear_1(x)))
        if family == "gemma3":
            return x @ inner.multi_modal_projector.mm_input_projection_weight
        return inner.connector.modality_projection.proj(x)

    return [Tokens(project(x.features), x.source) for x in tokens]


def everything(seen: Squares) -> list[Tokens]:
    return [Tokens(x, list(range(len(x)))) for x in seen.tokens]


def fastervlm(seen: Squares, keep: float) -> list[Tokens]:
    return [Tokens(x[places], places) for x, places in zip(seen.tokens, best(seen.row, keep), strict=True)]


def vispruner(seen: Squares, keep: float) -> list[Tokens]:
    chosen = reference.distinct_scores(seen.row, seen.tokens, keep, 0.5)
    return [Tokens(x[places], places) for x, places in zip(seen.tokens, best(chosen, keep), strict=True)]


def visionzip(seen: Squares, dominant: int, contextual: int) -> list[Tokens]:
    """Dominant tokens are all squares: CLS is not one of them."""
    weights, source = reference.visionzip(seen.row, seen.keys, dominant, contextual)
    return [Tokens(w @ x, s.tolist()) for w, x, s in zip(weights, seen.tokens, source, strict=True)]


def prumerge(seen: Squares, keep: float | None = None) -> list[Tokens]:
    found = reference.prumerge(seen.fused_row, seen.fused_keys, keep, False, 32)
    return [Tokens(weights @ x, source) for x, (weights, source) in zip(seen.tokens, found, strict=True)]


def average_pool(seen: Squares, factor: int) -> list[Tokens]:
    side = int(seen.tokens.shape[1] ** 0.5)
    image = seen.tokens.transpose(1, 2).unflatten(2, (side, side))
    pooled = torch.nn.functional.avg_pool2d(image, factor).flatten(2).transpose(1, 2)
    corners = range(0, side, factor)
    return [Tokens(x, [row * side + column for row in corners for column in corners]) for x in pooled]


@contextmanager
def showing(model: Any, inputs: Mapping[str, Tensor], tokens: list[Tokens]) -> Iterator[dict[str, Tensor]]:
    """Inputs without pixels; while open, the decoder reads these projected tokens where the ids are an image's."""
    image = inputs["input_ids"] == model.config.image_token_id
    features = torch.cat([x.features for x in tokens]) if tokens else None

    def put(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        embeddings = options["inputs_embeds"].clone()
        if features is not None:
            embeddings[:, : image.shape[1]][image] = features
        return args, {**options, "inputs_embeds": embeddings}

    inner = model.model.text_model if _nested(model) else model.model.language_model
    hook = inner.register_forward_pre_hook(put, with_kwargs=True)
    try:
        yield {name: value for name, value in inputs.items() if name != "pixel_values"}
    finally:
        hook.remove()
