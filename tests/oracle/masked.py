"""What the pruning papers simulate: a Hugging Face model run with explicit masks.

Nothing is removed here. Keys are hidden by S x S masks, heads and neurons are multiplied by zero, and
every token stays in the sequence. It is slow and simple on purpose: the compiler's rewrites, which do
remove the work, are tested against it. It uses plain transformers and nothing of the compiler.

Sources of the semantics:

- late layers without visual tokens: YOPO, arXiv 2410.06169 (layer drop), with the softmax renormalised
  over the text keys as in VTW, arXiv 2405.05803;
- heads dropped for visual tokens: YOPO (non-active heads), renormalised in the same way, or not, as in its code;
- neurons dropped for visual tokens: YOPO (sparse FFN projection);
- visual tokens that see their neighbours in the image only: YOPO (neighbor-aware visual attention), in which
  the visual block of the mask is overwritten, so that a token may see later ones;
- visual tokens pruned by the last token's attention: FastV, arXiv 2403.06764, and PyramidDrop, arXiv 2410.17247.

Shapes: B rows, S positions, L decoder layers, H query heads, V vocabulary. A token is visual where
`input_ids` is the model's image token, and what stands there is no newline.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import sliding_window_overlay
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from tests.oracle.anyres import newlines
from tests.oracle.masks import Before, Masks, Neighbors, Prune, check, last_place

_IMPLEMENTATION = "masked_oracle"


@dataclass(frozen=True)
class MaskedOutput:
    """`logits` [B, V] float32, for the token after each row's last attended one; `kept`, for each prune
    of the masks in their order, bool [B, S]: the visual tokens that are left (False on text); `mixes`: its weights."""

    logits: Tensor
    kept: tuple[Tensor, ...]
    mixes: tuple[Tensor | None, ...]


_NOTHING_HIDDEN = Masks()


@torch.no_grad()
def masked_forward(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], masks: Masks = _NOTHING_HIDDEN
) -> MaskedOutput:
    """Run `model` on a batch, padded on either side or not at all, with `masks`.

    `inputs` are what the processor gives. Without `position_ids` a token's position is the number of
    attended tokens before it, as in `generate`. The model is left as it was, also after an error.
    """
    logits, run = _run(model, inputs, masks)
    rows = torch.arange(len(logits), device=logits.device)
    return MaskedOutput(logits[rows, last_place(run.tokens.attended)].float(), tuple(run.kept), tuple(run.mixes))


def masked_loss(model: PreTrainedModel, inputs: Mapping[str, Tensor], labels: Tensor, masks: Masks) -> Tensor:
    """The mean cross-entropy of labels [B, S] (-100: none) under `masks`, each predicted by the token before it.

    Gradients flow. Prunes must be given: what "the last text token" is depends on where the prompt ends.
    """
    if any(prune.choose != "given" for prune in masks.prunes):
        raise ValueError('prunes must be "given"')
    logits, _ = _run(model, inputs, masks)
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


def _run(model: PreTrainedModel, inputs: Mapping[str, Tensor], masks: Masks) -> tuple[Tensor, _Run]:
    tokens = _Tokens.of(model, inputs)
    check(_decoder(model).config, masks, tokens.attended, tokens.visual)
    run = _Run(masks, tokens)
    arguments = {"attention_mask": tokens.attended.long(), **inputs}
    if "position_ids" not in inputs:
        arguments["position_ids"] = _positions(model, inputs, tokens.attended)
    with _installed(model, run):
        logits = model(**arguments, use_cache=False).logits
    if run.layers_seen != len(_layers(model)):
        raise RuntimeError(f"the model used the oracle's attention {run.layers_seen} times, not once a layer")
    return logits, run


def masked_greedy(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    masks: Masks,
    new_tokens: int,
    hold_choices: bool = True,
) -> Tensor:
    """The next `new_tokens` most likely tokens, int64 [B, new_tokens], without any cache: the whole
    prompt runs again for each token.

    New tokens stand behind the farthest position, as in transformers' own `generate`: with M-RoPE a video's last
    frame may be farther along than the text behind it. With `hold_choices` the visual tokens that were pruned for the
    prompt stay the pruned ones, as they do when decoding from a cache; otherwise each longer prompt chooses anew. No
    end token is heeded.
    """
    if "position_ids" in inputs:
        raise NotImplementedError("position_ids are not extended; leave them out")
    inputs, masks = _left_padded(inputs, masks)
    if hold_choices and masks.prunes:
        first = masked_forward(model, inputs, masks)
        held = zip(masks.prunes, first.kept, first.mixes, strict=True)
        prunes = tuple(replace(p, choose="given", given=k, by=None, mix=m) for p, k, m in held)
        masks = replace(masks, prunes=prunes)
    produced: list[Tensor] = []
    grids = hasattr(model.model, "get_rope_index")
    inputs = {**inputs, "position_ids": _positions(model, inputs, inputs["attention_mask"])} if grids else inputs
    for _ in range(new_tokens):
        token = masked_forward(model, inputs, masks).logits.argmax(-1)
        if bool(_kinds(model, token).any()):
            raise ValueError("the model produced an image token, which would be taken for an image")
        produced.append(token)
        inputs, masks = _appended(inputs, masks, token)
    return torch.stack(produced, dim=1) if produced else inputs["input_ids"][:, :0]


@dataclass(frozen=True)
class _Tokens:
    """What each position holds: both bool [B, S]. Padding is not attended; visual tokens are.

    blocks: int64 [B, S], the image whose tokens all see each other, -1 for none; for Gemma 3, by its own function.
    """

    attended: Tensor
    visual: Tensor
    blocks: Tensor | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> _Tokens:
        ids = inputs["input_ids"]
        attended = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        types = inputs.get("token_type_ids")
        blocks = None if types is None else get_block_sequence_ids_for_mask(types)
        return cls(attended, attended & (_kinds(model, ids) > 0) & ~newlines(model, inputs), blocks)


class _Run:
    """One masked forward pass: what is still alive, and what the attention of each layer does."""

    def __init__(self, masks: Masks, tokens: _Tokens) -> None:
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


_ACTIVE: ContextVar[_Run] = ContextVar("masked_oracle_run")


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


# A name that has no mask function gets no mask from transformers; `_Run` makes its own.
AttentionInterface.register(_IMPLEMENTATION, _attention)


@contextmanager
def _installed(model: PreTrainedModel, run: _Run) -> Iterator[None]:
    """The decoder of `model` attends and computes its FFN by `run`, for the length of the context."""
    config = _decoder(model).config
    before = config._attn_implementation
    token = _ACTIVE.set(run)
    with ExitStack() as stack:
        stack.callback(_ACTIVE.reset, token)
        if any(prune.by is not None or prune.mix is not None for prune in run.masks.prunes):
            for index, layer in enumerate(_layers(model)):
                hook = layer.register_forward_pre_hook(_entering_hook(run, index), with_kwargs=True)
                stack.callback(hook.remove)
        if run.masks.neurons is not None:
            for index, layer in enumerate(_layers(model)):
                hook = layer.mlp.down_proj.register_forward_pre_hook(_ffn_hook(run, index))
                stack.callback(hook.remove)
        stack.callback(setattr, config, "_attn_implementation", before)
        config._attn_implementation = _IMPLEMENTATION
        yield


def _entering_hook(run: _Run, layer: int) -> Callable[..., Any]:
    def hook(_module: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> Any:
        return (run.enter(layer, arguments[0]), *arguments[1:]), options

    return hook


def _ffn_hook(run: _Run, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (run.activations(layer, arguments[0]), *arguments[1:])

    return hook


def _decoder(model: Any) -> Any:
    names = [name for name in ("language_model", "text_model") if hasattr(model.model, name)]
    return getattr(model.model, names[0]) if names else model.model


def _layers(model: PreTrainedModel) -> Any:
    return _decoder(model).layers


def _kinds(model: Any, ids: Tensor) -> Tensor:
    """What each token is: 0 for text, 1 for an image's, 2 for a video's; int64 [B, S]."""
    image, video = (getattr(model.config, f"{kind}_token_id", -1) for kind in ("image", "video"))
    return (ids == image).long() + 2 * (ids == video)


def _positions(model: Any, inputs: Mapping[str, Tensor], attended: Tensor) -> Tensor:
    """What transformers would count: for M-RoPE [3, B, S], by its own function."""
    if hasattr(model.model, "get_rope_index"):
        ids = inputs["input_ids"]
        grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        grids |= {name: inputs[name] for name in ("second_per_grid_ts",) if name in inputs}
        kinds = _kinds(model, ids).int()
        found = model.model.get_rope_index(ids, mm_token_type_ids=kinds, attention_mask=attended.long(), **grids)
        return found[0]
    return (attended.long().cumsum(dim=1) - 1).clamp(min=0)


def _by_position(scores: Tensor, visual: Tensor) -> Tensor:
    """Scores [B, most visual tokens of a row] put at the visual tokens' places: [B, S], 0 elsewhere."""
    placed = torch.zeros(visual.shape, dtype=scores.dtype, device=scores.device)
    for row, places in enumerate(visual):
        placed[row, places] = scores[row, : int(places.sum())]
    return placed


def _left_padded(inputs: Mapping[str, Tensor], masks: Masks) -> tuple[dict[str, Tensor], Masks]:
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


def _appended(inputs: Mapping[str, Tensor], masks: Masks, token: Tensor) -> tuple[dict[str, Tensor], Masks]:
    """The prompt with one more text token, int64 [B], in each row."""
    attended = inputs["attention_mask"]
    new = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], token[:, None]], dim=1),
        "attention_mask": torch.cat([attended, torch.ones_like(attended[:, :1])], dim=1),
    }
    if "position_ids" in inputs:
        positions = inputs["position_ids"]
        behind = positions.amax((0, 2), keepdim=True) + 1
        new["position_ids"] = torch.cat([positions, behind.expand(len(positions), -1, 1)], dim=2)
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


__all__ = ["MaskedOutput", "Masks", "Neighbors", "Prune", "masked_forward", "masked_greedy"]
