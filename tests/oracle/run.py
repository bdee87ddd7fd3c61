"""One run of a Hugging Face decoder whose attention and FFN heed explicit masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import sliding_window_overlay

from tests.oracle.masks import Before, Masks, Neighbors, Prune, last_place
from tests.oracle.prompts import Tokens

_IMPLEMENTATION = "masked_oracle"


class Run:
    """One masked forward pass: what is still alive, and what the attention of each layer does."""

    def __init__(self, masks: Masks, tokens: Tokens) -> None:
        self.masks = masks
        self.tokens = tokens
        self.text = tokens.attended & ~tokens.visual
        self.alive = tokens.visual  # [B, S]: the visual tokens that are not pruned yet
        self.kept = [tokens.visual] * len(masks.prunes)
        self.mixes = [prune.mix for prune in masks.prunes]
        self.reaching: dict[int, Tensor] = {}  # `alive` as each layer found it
        self.scores: Tensor | None = None  # [B, S]: the last text token's row in the layer before
        self.before: tuple[Tensor, Tensor] | None = None  # weights and keys of the layer before
        self.embeddings: Tensor | None = None  # what entered the first layer
        self.layers_seen = 0
        self.window: int | None = None  # of the layer at hand

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None = None
    ) -> Tensor:
        """Attention of one layer: [B, H, S, E] each (keys and values already repeated) to [B, S, H, E].

        window: the layer sees no key that stands so many places before the query, or more.
        """
        self.window = window
        self.reaching.setdefault(layer, self.alive)
        logits = (query @ key.transpose(2, 3)) * scaling
        for index, prune in enumerate(self.masks.prunes):
            if prune.layer == layer and prune.choose != "by":
                if prune.choose == "pyramid":
                    self.scores = self._last_row(self._softmax(layer, logits))
                self.alive = self.kept[index] = self._chosen(prune)
        weights = self._softmax(layer, logits)
        self.scores = self._last_row(weights)
        self.before = (weights, key)
        self.layers_seen += 1
        output = (weights.to(value.dtype) @ value).transpose(1, 2)
        if self.masks.heads is None:
            return output
        dropped = ~self.masks.heads[layer].to(output.device)
        return output.masked_fill(self.tokens.visual[:, :, None, None] & dropped[None, None, :, None], 0)

    def enter(self, layer: int, hidden: Tensor) -> Tensor:
        """What enters a layer [B, S, D], after the choices that look at it."""
        if layer == 0:
            self.embeddings = hidden
        self.reaching[layer] = self.alive
        for index, prune in enumerate(self.masks.prunes):
            mix = prune.mix
            if prune.layer == layer and prune.by is not None:
                assert self.before is not None and self.embeddings is not None
                weights, keys = self.before
                visual, reaching = self.tokens.visual, self.reaching
                seen = Before(hidden, self.embeddings, weights, keys, self.alive, visual, self.text, reaching)
                self.alive, mix = prune.by(seen)
                self.kept[index], self.mixes[index] = self.alive, mix
            if prune.layer == layer and mix is not None:
                hidden = mix.to(hidden) @ hidden
        return hidden

    def activations(self, layer: int, activations: Tensor) -> Tensor:
        """gate * up [B, S, intermediate] with the neurons that visual rows do without set to zero."""
        assert self.masks.neurons is not None
        dropped = ~self.masks.neurons[layer].to(activations.device)
        return activations.masked_fill(self.tokens.visual[:, :, None] & dropped, 0)

    def _softmax(self, layer: int, logits: Tensor) -> Tensor:
        """Weights [B, H, S, S] in float32, exactly zero on the keys that a query does not see."""
        visible = self._visible(layer, heads=logits.shape[1])
        # Not -inf: a padded or pruned query may see nothing at all. No one reads its row, but the nan
        # of an empty softmax would spread through the values.
        weights = logits.float().masked_fill(~visible, torch.finfo(torch.float32).min).softmax(dim=-1)
        if self.masks.heads is None or self.masks.renorm:
            return weights
        dropped = ~self.masks.heads[layer].to(weights.device)
        return weights.masked_fill(dropped[None, :, None, None] & self.tokens.visual[:, None, None, :], 0)

    def _visible(self, layer: int, heads: int) -> Tensor:
        """Which query sees which key: bool [B, H, S, S]."""
        size = self.text.shape[1]
        causal = torch.ones(size, size, dtype=torch.bool, device=self.text.device).tril()
        keys = self.text | self.alive
        if self.tokens.blocks is not None:
            blocks = self.tokens.blocks
            causal = causal | ((blocks[:, :, None] == blocks[:, None, :]) & (blocks >= 0)[:, :, None])
        if self.window is not None:
            places = torch.arange(size, device=self.text.device)
            causal = causal & sliding_window_overlay(self.window)(0, 0, places[:, None], places[None, :])
        seen = causal & keys[:, None, :]
        near = self.masks.neighbors
        if near is not None and (near.layers is None or layer in near.layers):
            visual = _near(near, self.tokens.visual) & self.alive[:, None, :]
            text = causal & self.text[:, None, :] & near.see_prefix
            seen = torch.where(self.tokens.visual[:, :, None], visual | text, seen)
        everything = seen[:, None]
        text_to_visual = self.text[:, :, None] & self.tokens.visual[:, None, :]
        without_visual = everything & ~text_to_visual[:, None]
        sees_visual = torch.ones(heads, dtype=torch.bool, device=self.text.device)
        if self.masks.heads is not None and self.masks.renorm:
            sees_visual = self.masks.heads[layer].to(self.text.device)
        if self.masks.cut_from is not None and layer >= self.masks.cut_from:
            sees_visual = torch.zeros_like(sees_visual)
        return torch.where(sees_visual[None, :, None, None], everything, without_visual)

    def _last_row(self, weights: Tensor) -> Tensor:
        """What the last text token pays to each key: [B, S], the mean over heads."""
        rows = torch.arange(len(weights), device=weights.device)
        return weights[rows, :, last_place(self.text)].mean(dim=1)

    def _chosen(self, prune: Prune) -> Tensor:
        """The visual tokens that survive `prune`: bool [B, S]."""
        if prune.choose == "given":
            assert prune.given is not None
            given = prune.given.to(self.alive.device)
            if given.dtype == torch.bool:
                return self.alive & given
            scores = _by_position(given, self.tokens.visual)
        else:
            assert self.scores is not None
            scores = self.scores
        chosen = torch.zeros_like(self.alive)
        for row, alive in enumerate(self.alive):
            places = alive.nonzero().squeeze(1)
            best_first = scores[row, places].argsort(descending=True, stable=True)
            whole = self.reaching[prune.of][row].sum() if prune.choose == "pyramid" else len(places)
            chosen[row, places[best_first[: math.floor(prune.keep * int(whole))]]] = True
        return chosen


def _near(near: Neighbors, visual: Tensor) -> Tensor:
    """Which tokens are neighbours: bool [B, S, S], for visual tokens as queries and keys."""
    height, width = near.grid
    number = visual.long().cumsum(dim=1) - 1
    places = torch.arange(visual.shape[1], device=visual.device).expand_as(visual)
    image, row, column = number // (height * width), number // width % height, number % width
    if near.coords is not None:
        image, row, column = near.coords.to(visual.device).unbind(2)

    def apart(x: Tensor) -> Tensor:
        return (x[:, :, None] - x[:, None, :]).abs()

    if near.metric == "raster":
        close = apart(places) <= near.radius
    elif near.metric == "euclidean":
        close = apart(row) ** 2 + apart(column) ** 2 <= near.radius**2
    else:
        close = torch.maximum(apart(row), apart(column)) <= near.radius
    close &= (apart(image) == 0) & visual[:, :, None] & visual[:, None, :]
    return close & (places[:, None, :] <= places[:, :, None]) if near.causal else close


_ACTIVE: ContextVar[Run] = ContextVar("masked_oracle_run")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls: [B, H, S, E], [B, Hk, S, E] x 2 to [B, S, H, E]."""
    window = kwargs.get("sliding_window")
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise NotImplementedError("attention with a soft cap or sinks")
    if attention_mask is not None:
        raise NotImplementedError("a mask of the model's own, which the oracle would not heed")
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    layer = module.layer_idx
    assert isinstance(layer, int)
    return _ACTIVE.get().attend(layer, query, key, value, scaling, window), None


# A name that has no mask function gets no mask from transformers; `Run` makes its own.
AttentionInterface.register(_IMPLEMENTATION, _attention)


@contextmanager
def installed(model: PreTrainedModel, run: Run) -> Iterator[None]:
    """The decoder of `model` attends and computes its FFN by `run`, for the length of the context."""
    config = decoder(model).config
    before = config._attn_implementation
    token = _ACTIVE.set(run)
    with ExitStack() as stack:
        stack.callback(_ACTIVE.reset, token)
        if any(prune.by is not None or prune.mix is not None for prune in run.masks.prunes):
            for index, layer in enumerate(layers(model)):
                hook = layer.register_forward_pre_hook(_entering_hook(run, index), with_kwargs=True)
                stack.callback(hook.remove)
        if run.masks.neurons is not None:
            for index, layer in enumerate(layers(model)):
                hook = layer.mlp.down_proj.register_forward_pre_hook(_ffn_hook(run, index))
                stack.callback(hook.remove)
        stack.callback(setattr, config, "_attn_implementation", before)
        config._attn_implementation = _IMPLEMENTATION
        yield


def _entering_hook(run: Run, layer: int) -> Callable[..., Any]:
    def hook(_module: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
        return (run.enter(layer, arguments[0]), *arguments[1:]), options

    return hook


def _ffn_hook(run: Run, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (run.activations(layer, arguments[0]), *arguments[1:])

    return hook


def decoder(model: Any) -> Any:
    names = [name for name in ("language_model", "text_model") if hasattr(model.model, name)]
    return getattr(model.model, names[0]) if names else model.model


def layers(model: PreTrainedModel) -> Any:
    return decoder(model).layers


def _by_position(scores: Tensor, visual: Tensor) -> Tensor:
    """Scores [B, most visual tokens of a row] put at the visual tokens' places: [B, S], 0 elsewhere."""
    placed = torch.zeros(visual.shape, dtype=scores.dtype, device=scores.device)
    for row, places in enumerate(visual):
        placed[row, places] = scores[row, : int(places.sum())]
    return placed
