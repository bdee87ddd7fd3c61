"""Decode steps of cache policies beside the oracle's, head by head."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from foveate.cache import HeavyRecentCache, VisualTextCache
from foveate.errors import FoveateWarning
from foveate.ir.rules import verify
from foveate.ir.split import structure
from foveate.ir.text import parse_graphs
from foveate.model import OptimizedModel
from foveate.models.random import random_inputs, random_llava
from foveate.ops import PAD
from foveate.passes import Pass, parse_pipeline, pipeline_text
from tests.oracle import kv
from tests.oracle.masks import Masks
from tests.passes.check import PROMPTS, TOLERANCE, optimize


def check(
    model: Any,
    passes: Sequence[Pass],
    makes: Any,
    masks: Masks | None = None,
    prompts: Sequence[dict[str, Any]] = PROMPTS,
    steps: int = 5,
) -> OptimizedModel:
    """Hold prefill and decode steps of random tokens against the oracle, and what each head holds."""
    assert parse_pipeline(pipeline_text(passes)) == list(passes)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FoveateWarning)
        optimized = optimize(model, passes)
    program = optimized.program
    verify(program)
    for name in ("vision", "prefill"):
        assert structure(parse_graphs(program, program.to_text(name))[name]) == structure(program.graphs[name])
    for number, prompt in enumerate(prompts):
        inputs = random_inputs(model, seed=number, **prompt)
        tokens = torch.randint(3, 40, (len(inputs["input_ids"]), steps), generator=torch.Generator().manual_seed(1))
        expected = kv.decoded(model, inputs, masks or Masks(), makes, tokens, program.info.kv_heads)
        logits, held, cache = stepwise(optimized, inputs, tokens)
        for step, (mine, theirs) in enumerate(zip(logits, expected.logits, strict=True)):
            error = (mine - theirs).abs().max().item()
            assert error < TOLERANCE, f"{prompt}, step {step}: logits differ from the oracle by {error:.1e}"
        assert held == ranks(expected.held[0], inputs), prompt
        for layer, evicting in cache.evicting.items():
            left = later(held[layer], evicting, inputs, steps)
            assert left == ranks(expected.held[-1], inputs)[layer], f"{prompt}, layer {layer}"
    return optimized


@torch.inference_mode()
def stepwise(optimized: Any, inputs: Any, tokens: Tensor) -> tuple[list[Tensor], kv.Held, VisualTextCache]:
    """Logits behind the prompt and each token, what was held behind the prompt, and the cache."""
    out = optimized(**inputs)
    logits, cache = [out.logits[:, 0]], out.past_key_values
    for token in tokens.unbind(1):
        logits.append(optimized(input_ids=token[:, None], past_key_values=cache).logits[:, 0])
    return logits, numbered(out.held, inputs), cache


def later(held: list[list[list[int]]], cache: HeavyRecentCache, inputs: Any, steps: int) -> list[list[list[int]]]:
    """What a layer's cache holds after so many steps, as numbers among a row's real tokens; held: before them."""
    numbers = cache.numbers.view()
    found: list[list[list[int]]] = []
    for b, row in enumerate(held):
        names = [[*head, *(int(inputs["attention_mask"][b].sum()) + step for step in range(steps))] for head in row]
        found.append([sorted(names[h][n] for n in numbers[b, h].tolist() if n != PAD) for h in range(len(row))])
    return found


def numbered(held: dict[int, Tensor], inputs: Any) -> kv.Held:
    """Places as numbers among a row's real tokens."""
    number = inputs["attention_mask"].cumsum(1) - 1
    return [
        [[sorted(number[b, p].item() for p in head[head != PAD]) for head in row] for b, row in enumerate(held[layer])]
        for layer in sorted(held)
    ]


def ranks(held: kv.Held, inputs: Any) -> kv.Held:
    """Places in the prompt padded on the left as numbers among a row's real tokens."""
    pads = (inputs["attention_mask"] == 0).sum(1).tolist()
    return [[[[p - pads[b] for p in head] for head in row] for b, row in enumerate(layer)] for layer in held]


_MODELS: dict[tuple[int, int], Any] = {}


@st.composite
def cases(draw: Any) -> Any:
    shape = draw(st.sampled_from([(4, 4), (4, 2), (6, 2), (4, 1)]))
    if shape not in _MODELS:
        heads, kv_heads = shape
        _MODELS[shape] = random_llava(layers=2, hidden=heads * 8, heads=heads, kv_heads=kv_heads, ffn=48)
    counts = draw(st.lists(st.integers(0, 2), min_size=1, max_size=3))
    prompt = {
        "images_per_row": counts,
        "batch": len(counts),
        "padding": draw(st.sampled_from(["left", "right"])),
        "text_tokens": draw(st.integers(6, 20)),
        "prefix": draw(st.integers(0, 3)),
    }
    return _MODELS[shape], prompt
