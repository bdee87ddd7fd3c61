"""Decoding steps as one CUDA graph: a step is one launch instead of some thirty for each layer.

    out = run(cache, token)       once:  graph = capture(run over the cache's whole buffers, writing its new keys)
    cache.extend(out["kv"])       then:  copy in token, position and slot; graph.replay()

A buffer's free room has order `PAD`, which no query sees, so its shape can stay the same from step to step; when it is
full, or was moved, the step is captured again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.backends.base import Runner
from foveate.cache import VisualTextCache

Step = Callable[[], Tensor]
Capture = Callable[[Step], tuple[Callable[[], object], Tensor]]
"""Makes a step repeatable: what repeats it, and the tensor that then holds its result."""

WARMUPS = 2
"""Steps before a capture, in which libraries set up what may not be set up within one."""


def cuda_graph(step: Step) -> tuple[Callable[[], object], Tensor]:
    """A `Capture` on the current CUDA device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUPS):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph.replay, result


class CapturedStep:
    """One decode step of one token a row over a cache's buffers as they are now."""

    def __init__(self, run: Runner, cache: VisualTextCache, inputs: dict[str, Tensor], capture: Capture) -> None:
        self.inputs = {name: value.clone() for name, value in inputs.items()}
        # Where the new keys go.
        self.slot = torch.full((1,), cache.text["past_order"].length, device=inputs["text"].device)
        self.buffers = _buffers(cache)

        def step() -> Tensor:
            out = run({**cache.inputs(whole=True), **self.inputs})
            for layer, (_, _, *new) in enumerate(out["kv"]):
                for name, value in zip(("past_k", "past_v"), new, strict=True):
                    # Its order is not written yet, so no step sees the new key a second time.
                    self.buffers[f"{name}_{layer}"].index_copy_(2, self.slot, value)
            logits: Tensor = out["logits"]
            return logits

        self.replay, self.logits = capture(step)

    def fits(self, cache: VisualTextCache) -> bool:
        """Whether the cache's buffers are still those of the capture."""
        return all(self.buffers[name] is value for name, value in _buffers(cache).items())

    def __call__(self, cache: VisualTextCache, inputs: dict[str, Tensor]) -> Tensor:
        """Logits [B, 1, V]; the new keys and values then stand in the buffers."""
        for name, value in inputs.items():
            self.inputs[name].copy_(value)
        self.slot.fill_(cache.text["past_order"].length)
        self.replay()
        for name, part in cache.text.items():
            if name != "past_order":
                part.length += 1
        return self.logits.clone()


def captured(run: Runner, cache: VisualTextCache, inputs: dict[str, Tensor], capture: Capture) -> Tensor:
    """The logits of the next step, captured first where it has to be; `cache.extend([], order)` belongs behind it."""
    for part in cache.text.values():
        part.reserve(1)
    if cache.step is None or not cache.step.fits(cache):
        cache.step = CapturedStep(run, cache, inputs, capture)
    logits: Tensor = cache.step(cache, inputs)
    return logits


def _buffers(cache: VisualTextCache) -> dict[str, Any]:
    return {name: part.whole() for name, part in cache.text.items()}
