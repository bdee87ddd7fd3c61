"""Trained selections as plain torch: modules as `nn.Module`s, attention with explicit matrices, a loss by hooks.

Uses plain transformers and nothing of the compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from tests.oracle.masks import Before, Choice

Score = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Visual hidden states [n, D], text ones [m, D], how much each visual token is still there [n] -> scores [n]."""


class CrossBlock(nn.Module):
    """One cross-attention block of LVPruning, of 8 heads."""

    def __init__(self, size: int, heads: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(size, size, bias=False) for _ in "qkvo")
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)
        self.heads = heads

    def forward(self, visual: Tensor, text: Tensor) -> Tensor:
        """[n, D] and [m, D] to [n, D]."""
        q, k, v = self.q(visual), self.k(text), self.v(text)
        outs = []
        for a, b, c in zip(q.chunk(self.heads, 1), k.chunk(self.heads, 1), v.chunk(self.heads, 1)):
            outs.append(torch.softmax(a @ b.T / math.sqrt(a.shape[1]), dim=1) @ c)
        out = self.o(torch.cat(outs, 1)) + q
        result: Tensor = self.norm2(self.down(nn.functional.silu(self.up(self.norm1(out)))))
        return result


class LVModule(nn.Module):
    """The module of LVPruning: gamma_0 - gamma_1 of each visual token."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CrossBlock(size) for _ in range(2))
        self.head = nn.Linear(size, 2)

    def forward(self, visual: Tensor, text: Tensor, there: Tensor) -> Tensor:
        """[n, D] and [m, D] to [n]."""
        for block in self.blocks:
            visual = block(visual, text)
        gamma = self.head(visual)
        return gamma[:, 0] - gamma[:, 1]


class ViTModule(nn.Module):
    """DynamicViT's predictor; its first and second linear are kept in halves, and are put together here."""

    def __init__(self, size: int) -> None:
        super().__init__()
        half = size // 2
        self.norm = nn.LayerNorm(size)
        self.local, self.whole, self.own = nn.Linear(size, half), nn.Linear(size, half), nn.Linear(half, half)
        self.mean = nn.Linear(half, half, bias=False)
        self.down, self.head = nn.Linear(half, size // 4), nn.Linear(size // 4, 2)

    def forward(self, visual: Tensor, text: Tensor, there: Tensor) -> Tensor:
        """As the paper's code writes it: one linear, halves, the policy-weighted mean, concatenation."""
        first = torch.cat([self.local.weight, self.whole.weight]), torch.cat([self.local.bias, self.whole.bias])
        x = nn.functional.gelu(nn.functional.linear(self.norm(visual), *first))
        local, other = x.chunk(2, dim=1)
        mean = (other * there[:, None]).sum(0) / there.sum().clamp(min=1)
        x = torch.cat([local, mean.expand_as(local)], 1)
        second = torch.cat([self.own.weight, self.mean.weight], 1)
        x = self.down(nn.functional.gelu(nn.functional.linear(x, second, self.own.bias)))
        gamma = self.head(nn.functional.gelu(x)).log_softmax(1)
        return gamma[:, 0] - gamma[:, 1]


class TrimModule(nn.Module):
    """SmartTrim's token gate on a decoder: own token, mean of the image, last token of the prompt, side by side."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.norm, self.norm_text = nn.LayerNorm(size), nn.LayerNorm(size)
        self.own = nn.Linear(size, size // 2)
        self.image, self.text = (nn.Linear(size, size // 2, bias=False) for _ in range(2))
        self.head = nn.Linear(size // 2, 2)

    def forward(self, visual: Tensor, text: Tensor, there: Tensor) -> Tensor:
        """One linear of the concatenation."""
        x = self.norm(visual)
        mean = (x * there[:, None]).sum(0) / there.sum().clamp(min=1)
        side = torch.cat([x, mean.expand_as(x), self.norm_text(text[-1]).expand_as(x)], 1)
        weight = torch.cat([self.own.weight, self.image.weight, self.text.weight], 1)
        gamma = self.head(nn.functional.gelu(nn.functional.linear(side, weight, self.own.bias)))
        return gamma[:, 0] - gamma[:, 1]


def with_weights(module: nn.Module, tensors: Mapping[str, Tensor], layer: int) -> nn.Module:
    """The module with the weights of a file that belong to `layer`, all of them."""
    own = {name.partition(".")[2]: v for name, v in tensors.items() if name.startswith(f"{layer}.")}
    module.load_state_dict(own)
    return module


def learned(score: Score, keep: float, of: int) -> Choice:
    """floor(keep * visual tokens that reach layer `of`) of those that are left, by a module's score."""

    def choice(before: Before) -> tuple[Tensor, Tensor | None]:
        chosen = torch.zeros_like(before.alive)
        for row in range(len(chosen)):
            alive = before.alive[row].nonzero()[:, 0].tolist()
            if not alive:
                continue
            hidden = before.hidden[row]
            found = score(hidden[alive], hidden[before.text[row]], torch.ones(len(alive)))
            ranked = sorted(range(len(alive)), key=lambda j: (-float(found[j]), j))
            count = math.floor(keep * int(before.reaching[of][row].sum()))
            chosen[row, [alive[j] for j in ranked[:count]]] = True
        return chosen, None

    return choice


def cross_attention(q: Tensor, k: Tensor, v: Tensor, until: Tensor, k_order: Tensor, scale: float) -> Tensor:
    """`foveate::cross_attention`, row by row."""
    out = torch.zeros_like(q)
    for row in range(len(q)):
        seen = k_order[row] <= until[row]
        out[row] = torch.softmax(q[row] @ k[row][:, seen].transpose(1, 2) * scale, 2) @ v[row][:, seen]
    return out.transpose(1, 2)


def weighted_attention(
    q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], q_order: Tensor, k_order: Sequence[Tensor], weights: Tensor,
    scale: float,
) -> Tensor:  # fmt: skip
    """`foveate::weighted_attention` with the whole of exp(A) and M; e^A without any maximum taken off."""
    group = q.shape[1] // k[0].shape[1]
    keys, values = (torch.cat([*x], 2).repeat_interleave(group, 1) for x in (k, v))
    order = torch.cat([*k_order], 1)
    logits = q @ keys.transpose(2, 3) * scale
    causal = order[:, None, :] <= q_order[:, :, None]
    mask = torch.cat([weights, torch.ones_like(k_order[1], dtype=weights.dtype)], 1)
    own = order[:, None, :] == q_order[:, :, None]
    mask = torch.where(own, torch.ones_like(mask)[:, None], mask[:, None].expand(-1, q.shape[2], -1))
    shares = logits.exp() * (mask * causal)[:, None]
    return ((shares / shares.sum(3, keepdim=True)) @ values).transpose(1, 2)


@dataclass
class Run:
    """One forward pass in training form. visual, text: bool [B, S]; text ends before the answer. decided: D by layer,
    [B, S], 1 where nothing is decided."""

    scores: Mapping[int, Score]
    noise: Mapping[int, Tensor]
    attended: Tensor
    visual: Tensor
    text: Tensor
    decided: dict[int, Tensor] = field(default_factory=dict)

    def enter(self, layer: int, hidden: Tensor) -> None:
        """Decide before a layer that has a module; what went stays gone."""
        if layer not in self.scores:
            return
        now = list(self.decided.values())[-1] if self.decided else torch.ones(self.visual.shape)
        rows = []
        for row, there in enumerate(self.visual):
            place = there.nonzero()[:, 0]
            new = torch.ones(there.shape)
            if len(place):
                left = now[row, place]
                gamma = self.scores[layer](hidden[row, place], hidden[row, self.text[row]], left)
                drawn = gamma + self.noise[layer][row, : len(place)]
                two = torch.stack([drawn, torch.zeros_like(drawn)], 1)
                soft = torch.softmax(two, 1)[:, 0]
                hard = (drawn > 0).float() - soft.detach() + soft
                new = new.index_put((place,), hard * left)
            rows.append(new)
        self.decided[layer] = torch.stack(rows)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """exp(A) M / sum, with all of A and M: [B, H, S, E] to [B, S, H, E]."""
        size = query.shape[2]
        causal = torch.ones(size, size, dtype=torch.bool).tril() & self.attended[:, None, :]
        causal = causal | torch.eye(size, dtype=torch.bool)
        weights = list(self.decided.values())[-1] if self.decided else torch.ones(self.visual.shape)
        mask = torch.where(torch.eye(size, dtype=torch.bool), torch.ones(()), weights[:, None, :])
        logits = (query @ key.transpose(2, 3) * scaling).masked_fill(~causal[:, None], -torch.inf)
        shares = (logits - logits.amax(3, keepdim=True).detach()).exp() * mask[:, None]
        return ((shares / shares.sum(3, keepdim=True)) @ value).transpose(1, 2)


_ACTIVE: ContextVar[Run] = ContextVar("learned_oracle_run")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **also: Any
) -> tuple[Tensor, None]:
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    return _ACTIVE.get().attend(query, key, value, scaling), None


AttentionInterface.register("learned_oracle", _attention)


def learned_logits(
    model: Any, inputs: Mapping[str, Tensor], labels: Tensor, scores: Mapping[int, Score], noise: Mapping[int, Tensor]
) -> tuple[Tensor, Run]:
    """Logits [B, S, V] of a model under sampled decisions, and those decisions.

    scores: module by layer; noise: by layer, fp32 [B, most visual tokens of a row]. Text from the first label of a row
    on is not seen by the modules. Gradients flow to the modules and to the model.
    """
    ids, attended = inputs["input_ids"], inputs["attention_mask"].bool()
    visual = attended & (ids == model.config.image_token_id)
    answered = ((labels != -100).int().cumsum(1) > 0) & attended
    run = Run(scores, noise, attended, visual, attended & ~visual & ~answered)
    decoder = model.model.language_model
    before = decoder.config._attn_implementation
    token = _ACTIVE.set(run)
    with ExitStack() as stack:
        stack.callback(_ACTIVE.reset, token)
        stack.callback(setattr, decoder.config, "_attn_implementation", before)
        for number, layer in enumerate(decoder.layers):
            hook = layer.register_forward_pre_hook(
                lambda _m, args, number=number: run.enter(number, args[0])  # type: ignore[misc]  # it returns nothing
            )
            stack.callback(hook.remove)
        decoder.config._attn_implementation = "learned_oracle"
        positions = (attended.long().cumsum(1) - 1).clamp(min=0)
        logits: Tensor = model(**inputs, position_ids=positions, use_cache=False).logits
    return logits, run


def ratio_loss(run: Run, shares: Sequence[float], huber: bool = False) -> Tensor:
    """Mean over rows with an image of the mean over stages of the squared distance (or Huber's, with 0.5)."""
    losses = []
    for row, visual in enumerate(run.visual):
        for share, decided in zip(shares, run.decided.values(), strict=True):
            if visual.any():
                off = share - decided[row, visual].mean()
                losses.append(nn.functional.smooth_l1_loss(off, torch.zeros(()), beta=0.5) if huber else off**2)
    return torch.stack(losses).mean() if losses else torch.zeros(())
