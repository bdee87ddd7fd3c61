"""SnapKV: what each head keeps of a prompt's keys is what the Hugging Face model's own attention says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.models.random import random_inputs
from foveate.passes import SnapKV
from tests.oracle import kv
from tests.passes.check import optimize
from tests.passes.stepwise import cases, check

SNAPS = (
    {"capacity": 14, "window": 6},
    {"capacity": 12, "window": 11, "kernel": 3, "pooling": "max"},
    {"capacity": 0.5, "window": 4, "kernel": 1},
    {"capacity": 0.1, "window": 5, "pooling": "max"},
    {"capacity": 30, "window": 1},
)


def snap(options: dict[str, Any]) -> Any:
    return lambda: kv.SnapKV(**options)


@pytest.mark.slow
@pytest.mark.parametrize("options", SNAPS, ids=str)
def test_snapkv(model: Any, options: dict[str, Any]) -> None:
    check(model, [SnapKV(**options)], snap(options))


def test_snapkv_holds_what_eager_attention_matrices_say(gqa: Any) -> None:
    inputs = random_inputs(gqa, seed=3, text_tokens=20)
    before = gqa.config._attn_implementation
    gqa.set_attn_implementation("eager")
    with torch.inference_mode():
        matrices = gqa(**inputs, output_attentions=True).attentions
        held = optimize(gqa, [SnapKV(14, 6)])(**inputs).held
    gqa.set_attn_implementation(before)
    length = inputs["input_ids"].shape[1]
    for layer, matrix in enumerate(matrices):
        for head, rows in enumerate(matrix[0].unflatten(0, (2, -1)).sum(1)):
            assert held[layer][0, head].tolist() == kv.SnapKV(14, 6).start(list(range(length)), rows)


def test_a_prompt_within_the_capacity_is_kept_whole(gqa: Any) -> None:
    inputs = random_inputs(gqa, batch=2)
    tokens = torch.tensor([[5, 6, 7]] * 2)
    dense = optimize(gqa, [])
    for passes in ("snapkv", "snapkv{capacity=40,window=28}"):
        optimized = optimize(gqa, passes)
        with torch.inference_mode():
            a, b = dense(**inputs), optimized(**inputs)
            assert torch.equal(a.logits, b.logits)
            for token in tokens.unbind(1):
                pair = [
                    run(input_ids=token[:, None], past_key_values=out.past_key_values).logits
                    for run, out in ((dense, a), (optimized, b))
                ]
                torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    case=cases(),
    window=st.integers(1, 20),
    extra=st.integers(1, 20) | st.floats(0.05, 0.95),
    kernel=st.sampled_from([1, 3, 5, 7]),
    pooling=st.sampled_from(["avg", "max"]),
)
def test_any_snapkv(case: Any, window: int, extra: float, kernel: int, pooling: str) -> None:
    capacity = extra if isinstance(extra, float) else window + extra
    options = {"capacity": capacity, "window": window, "kernel": kernel, "pooling": pooling}
    check(case[0], [SnapKV(**options)], snap(options), prompts=[case[1]], steps=2)
