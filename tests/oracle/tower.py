"""What methods inside a LLaVA's vision tower do, image by image: Hugging Face's layers one by one, and plain lists.

Attention is an explicit matrix; tokens are Python objects that know the patches they were made of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.oracle.vision import Tokens, projected

Inside = Callable[[Any, Tensor], Tokens]
"""A model and an image's hidden states [1 + N, C] in front of the first layer -> what the projector is given."""


@dataclass(frozen=True)
class Token:
    """A token of the tower: its features [C], the place on the grid it stands for (-1: none), how many patches."""

    value: Tensor
    place: int
    size: int = 1


def tokens_by(method: Inside) -> Callable[[Any, Tensor], list[Tokens]]:
    """Pixels to each image's projected tokens."""

    def tokens(model: Any, pixel_values: Tensor) -> list[Tokens]:
        tower = _tower(model)
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
        return projected(model, [method(model, image) for image in hidden])

    return tokens


def _tower(model: Any) -> Any:
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower)


def feature_layers(model: Any) -> list[Any]:
    """The layers that the features come from."""
    layers = _tower(model).encoder.layers
    return list(layers)[: range(len(layers) + 1)[model.config.vision_feature_layer]]


@dataclass(frozen=True)
class Attended:
    """Behind a layer's attention: x + attention(norm(x)) [n, C], its keys [H, n, e] and its matrix [H, n, n]."""

    x: Tensor
    keys: Tensor
    matrix: Tensor


def attend(layer: Any, x: Tensor, sizes: Sequence[int] | None = None) -> Attended:
    """The first half of a layer; with sizes, a key counts as often as they say."""
    own = layer.self_attn
    heads = own.num_heads
    normed = layer.layer_norm1(x)
    q, k, v = (p(normed).unflatten(1, (heads, -1)).transpose(0, 1) for p in (own.q_proj, own.k_proj, own.v_proj))
    weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[2])).exp()
    if sizes is not None:
        weights = weights * torch.tensor([float(size) for size in sizes])
    matrix = weights / weights.sum(2, keepdim=True)
    mixed = (matrix @ v).transpose(0, 1).flatten(1)
    return Attended(x + own.out_proj(mixed), k, matrix)


def mlp(layer: Any, x: Tensor) -> Tensor:
    """The second half."""
    out: Tensor = x + layer.mlp(layer.layer_norm2(x))
    return out


def start(hidden: Tensor) -> list[Token]:
    """CLS and the patches."""
    return [Token(value, number - 1) for number, value in enumerate(hidden)]


def stacked(tokens: list[Token]) -> Tensor:
    return torch.stack([token.value for token in tokens])


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a @ b / (a.norm() * b.norm())).detach())


def tome(merges: Sequence[int], proportional: bool = True, sort: bool = True) -> Inside:
    """Bipartite soft matching; merges: how many tokens are to go in each layer."""

    def method(model: Any, hidden: Tensor) -> Tokens:
        tokens = start(hidden)
        for layer, wanted in zip(feature_layers(model), merges, strict=True):
            sizes = [token.size for token in tokens]
            seen = attend(layer, stacked(tokens), sizes if proportional else None)
            tokens = [Token(x, t.place, t.size) for x, t in zip(seen.x, tokens, strict=True)]
            tokens = _bipartite(tokens, seen.keys.mean(0), min(wanted, (len(tokens) - 1) // 2))
            tokens = [Token(x, t.place, t.size) for x, t in zip(mlp(layer, stacked(tokens)), tokens, strict=True)]
        left = tokens[1:]
        if sort:
            left.sort(key=lambda token: token.place)
        return Tokens(stacked(left), [token.place for token in left])

    return method


def _bipartite(tokens: list[Token], metric: Tensor, merge: int) -> list[Token]:
    if not merge:
        return tokens
    even, odd = range(0, len(tokens), 2), range(1, len(tokens), 2)
    partner = {i: max(odd, key=lambda j: (cosine(metric[i], metric[j]), -j)) for i in even if i and odd}
    ranked = sorted(partner, key=lambda i: (-cosine(metric[i], metric[partner[i]]), i))
    going = ranked[:merge]
    made = [tokens[i] for i in even if i not in going]
    for j in odd:
        group = [tokens[j], *(tokens[i] for i in going if partner[i] == j)]
        size = sum(token.size for token in group)
        value = torch.stack([token.value * token.size for token in group]).sum(0) / size
        made.append(Token(value, tokens[j].place, size))
    return made


def cls_curve(layer: int, alpha: float = 0.075, mode: str = "expand") -> Inside:
    """After `layer` layers, as many patches as the curve of likeness to CLS says."""

    def method(model: Any, hidden: Tensor) -> Tokens:
        tokens = start(hidden)
        for number, each in enumerate(feature_layers(model)):
            if number == layer:
                tokens = _cut(tokens, alpha, mode)
            x = mlp(each, attend(each, stacked(tokens)).x)
            tokens = [Token(value, t.place) for value, t in zip(x, tokens, strict=True)]
        return Tokens(stacked(tokens[1:]), [token.place for token in tokens[1:]])

    return method


def _cut(tokens: list[Token], alpha: float, mode: str) -> list[Token]:
    cls, *patches = tokens
    logits = [float(cls.value.detach() @ p.value.detach()) / math.sqrt(len(cls.value)) for p in patches]
    shares = [math.exp(x - max(logits)) for x in logits]
    d = sorted((x / sum(shares) for x in shares), reverse=True)
    n = len(d)
    turn = max(range(1, n), key=lambda i: (n - i) * (d[0] - d[i - 1]) / (d[0] - d[n - 1]))
    many = {
        "expand": math.ceil(turn + alpha * turn),
        "literal": math.ceil(alpha * turn),
        "floor_add": turn + math.ceil(alpha * n),
    }
    best = sorted(patches, key=lambda p: (-logits[p.place], p.place))[: max(1, min(n, many[mode]))]
    return [cls, *sorted(best, key=lambda p: p.place)]


def crossget(merges: Sequence[int], vectors: Tensor | None = None, hand_on: bool = False) -> Inside:
    """Complete-graph soft matching with a cross token at the end; vectors [layers, C] are added to it."""

    def method(model: Any, hidden: Tensor) -> Tokens:
        tokens = [*start(hidden), Token(hidden[0], -1)]
        for number, (layer, wanted) in enumerate(zip(feature_layers(model), merges, strict=True)):
            cross = tokens[-1].value.detach()
            tokens[-1] = Token(cross if vectors is None else cross + vectors[number], -1)
            seen = attend(layer, stacked(tokens), [token.size for token in tokens])
            tokens = [Token(x, t.place, t.size) for x, t in zip(seen.x, tokens, strict=True)]
            matrix = seen.matrix.detach().mean(0)
            worth = (matrix[:-1].mean(0) + matrix[-1]).tolist()
            tokens = _complete(tokens, seen.keys.detach().mean(0), worth, min(wanted, (len(tokens) - 2) // 2))
            tokens = [Token(x, t.place, t.size) for x, t in zip(mlp(layer, stacked(tokens)), tokens, strict=True)]
        left = tokens[1:] if hand_on else tokens[1:-1]
        return Tokens(stacked(left), [token.place for token in left])

    return method


def _complete(tokens: list[Token], metric: Tensor, worth: list[float], merge: int) -> list[Token]:
    free = range(1, len(tokens) - 1)
    alike = {(i, j): cosine(metric[i], metric[j]) for i in free for j in free if i != j}
    ranked = sorted(free, key=lambda i: (-max([alike[i, j] for j in free if j != i], default=-math.inf), i))
    later = {i: ranked[place + 1 :] for place, i in enumerate(ranked)}
    going = sorted(free, key=lambda i: (worth[i] - max([alike[i, j] for j in later[i]], default=-math.inf), i))[:merge]
    stays = [i for i in range(len(tokens)) if i not in going]
    partner = {i: max((j for j in stays if j in free), key=lambda j: (alike[i, j], -j)) for i in going}
    made = []
    for d in stays:
        size, total = tokens[d].size, tokens[d].size * tokens[d].value
        for s in (s for s in going if partner[s] == d):
            weigh = [math.exp(worth[s]), math.exp(worth[d])]
            a, b = (2 * w / sum(weigh) for w in weigh)
            total = total + a * tokens[s].size * tokens[s].value + (b - 1) * tokens[d].size * tokens[d].value
            size += tokens[s].size
        made.append(Token(total / size, tokens[d].place, size))
    return made
