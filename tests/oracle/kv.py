"""What cache policies simulate: the Hugging Face model, run anew for each token, in which a new token's row of the
attention matrix is masked, head by head, to a list of tokens that is kept by hand.

Sources: SnapKV, arXiv 2404.14469, section 4; H2O, arXiv 2306.14048, section 4, which is stage two of arXiv 2409.01162.
Built on `tests.oracle.masked`, whose masks may hide more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from tests.oracle.masks import Masks, last_place
from tests.oracle.prompts import Tokens, appended, left_padded, positions
from tests.oracle.run import Run, installed

Held = list[list[list[list[int]]]]
"""[layer][row][key head]: places of the tokens that are cached, rising, in the prompt padded on the left."""


class Policy(Protocol):
    """One cache of one key head."""

    def start(self, tokens: list[int], rows: Tensor) -> list[int]:
        """What stays of a prompt's `tokens`; rows [S, S]: what each token pays to each, summed over the query group."""

    def step(self, held: list[int], new: int, row: Tensor) -> list[int]:
        """What stays when token `new` has paid `row` [S]."""


@dataclass
class SnapKV:
    """The last `window` tokens, and the earlier ones that they pay most to, pooled."""

    capacity: float
    window: int
    kernel: int = 5
    pooling: str = "avg"

    def start(self, tokens: list[int], rows: Tensor) -> list[int]:
        n = len(tokens)
        capacity = self.capacity
        if capacity < 1:
            capacity = max(math.floor(capacity * n), self.window)
        if n <= capacity:
            return tokens
        earlier, window = tokens[: n - self.window], tokens[n - self.window :]
        paid = [sum(float(rows[i, j]) for i in window) for j in earlier]
        pooled = []
        for at in range(len(earlier)):
            near = paid[max(0, at - self.kernel // 2) : at + self.kernel // 2 + 1]
            pooled.append(max(near) if self.pooling == "max" else sum(near) / self.kernel)
        best = sorted(range(len(earlier)), key=lambda i: (-pooled[i], i))[: int(capacity) - self.window]
        return [earlier[i] for i in sorted(best)] + window

    def step(self, held: list[int], new: int, row: Tensor) -> list[int]:
        return [*held, new]


@dataclass
class HeavyRecent:
    """The last `recent` tokens, and the `heavy` earlier ones to which most was paid since they came."""

    heavy: float
    recent: float

    def start(self, tokens: list[int], rows: Tensor) -> list[int]:
        n = len(tokens)
        self.most = math.floor(self.heavy * n) if isinstance(self.heavy, float) else self.heavy
        self.last = math.ceil(self.recent * n) if isinstance(self.recent, float) else self.recent
        self.sums = {j: sum(float(rows[i, j]) for i in tokens) for j in tokens}
        return self._left(tokens)

    def step(self, held: list[int], new: int, row: Tensor) -> list[int]:
        for j in [*held, new]:
            self.sums[j] = self.sums.get(j, 0.0) + float(row[j])
        return self._left([*held, new])

    def _left(self, tokens: list[int]) -> list[int]:
        if len(tokens) <= self.most + self.last:
            return tokens
        earlier, recent = tokens[: -self.last], tokens[-self.last :]
        heavy = sorted(earlier, key=lambda j: (-self.sums[j], j))[: self.most]
        self.sums = {j: self.sums[j] for j in [*heavy, *recent]}
        return sorted(heavy) + recent


class _Evicting(Run):
    """A masked run in which the last tokens see what their head's cache holds; held: before each of them."""

    def __init__(self, masks: Masks, tokens: Tokens, held: list[Held]) -> None:
        super().__init__(masks, tokens)
        self.held = held
        self.weights: list[Tensor] = []
        self.seen: list[Tensor] = []

    def _visible(self, layer: int, heads: int) -> Tensor:
        seen = super()._visible(layer, heads).clone()
        for query, held in enumerate(self.held, seen.shape[2] - len(self.held)):
            for b, row in enumerate(held[layer]):
                for h in range(heads):
                    mine = torch.zeros_like(seen[b, h, query])
                    mine[[*row[h * len(row) // heads], query]] = True
                    seen[b, h, query] &= mine
        return seen

    def _softmax(self, layer: int, logits: Tensor) -> Tensor:
        weights = super()._softmax(layer, logits)
        # Choices within a layer look at its weights first; the last ones are what its tokens pay.
        del self.weights[layer:], self.seen[layer:]
        self.weights.append(weights)
        self.seen.append(self._visible(layer, logits.shape[1]))
        return weights


@dataclass(frozen=True)
class Decoded:
    """Logits [B, V] behind the prompt and behind each token, and what was held before each of them."""

    logits: list[Tensor]
    held: list[Held]


@torch.no_grad()
def decoded(
    model: Any, inputs: Mapping[str, Tensor], masks: Masks, makes: Any, tokens: Tensor, kv_heads: int
) -> Decoded:
    """Feed a prompt, then `tokens` int64 [B, T] one by one; makes: a new policy for a layer, row and head."""
    inputs, masks = left_padded(inputs, masks)
    logits, run = _forward(model, inputs, masks, [])
    masks = replace(
        masks,
        prunes=tuple(
            replace(p, choose="given", given=kept, by=None, mix=mix)
            for p, kept, mix in zip(masks.prunes, run.kept, run.mixes)
        ),
    )
    last = int(inputs["input_ids"].shape[1]) - 1
    policies: Any = [[[makes() for _ in range(kv_heads)] for _ in logits] for _ in run.weights]
    held: Held = []
    for layer, (weights, seen) in enumerate(zip(run.weights, run.seen)):
        rows = _grouped(weights, kv_heads)
        found = [seen[b, 0, last].nonzero()[:, 0].tolist() for b in range(len(logits))]
        held.append(
            [[p.start(found[b], rows[b, h]) for h, p in enumerate(row)] for b, row in enumerate(policies[layer])]
        )
    result = Decoded([logits], [held])
    for token in tokens.unbind(1):
        inputs, masks = appended(inputs, masks, token)
        last += 1
        logits, run = _forward(model, inputs, masks, result.held)
        held = []
        for layer, weights in enumerate(run.weights):
            row = _grouped(weights, kv_heads)[:, :, last]
            before = result.held[-1][layer]
            held.append(
                [
                    [p.step(before[b][h], last, row[b, h]) for h, p in enumerate(heads)]
                    for b, heads in enumerate(policies[layer])
                ]
            )
        result.logits.append(logits)
        result.held.append(held)
    return result


def _grouped(weights: Tensor, kv_heads: int) -> Tensor:
    """Weights [B, H, S, S] summed over the query heads of each key head."""
    return weights.unflatten(1, (kv_heads, -1)).sum(2)


def _forward(model: Any, inputs: Mapping[str, Tensor], masks: Masks, held: list[Held]) -> tuple[Tensor, _Evicting]:
    run = _Evicting(masks, Tokens.of(model, inputs), held)
    arguments = {**inputs, "position_ids": positions(model, inputs, run.tokens.attended)}
    with installed(model, run):
        logits = model(**arguments, use_cache=False).logits
    rows = torch.arange(len(logits))
    return logits[rows, last_place(run.tokens.attended)].float(), run
