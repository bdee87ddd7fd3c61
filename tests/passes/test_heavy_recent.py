"""heavy-recent: what each head's cache evicts at each step, its bounds, and what cannot be done with it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import foveate
from foveate.cache import HeavyRecentCache
from foveate.errors import InputError
from foveate.models.random import random_inputs
from foveate.ops import PAD
from foveate.passes import CutVisual, HeavyRecent
from tests.oracle import kv
from tests.passes.check import PROMPTS, optimize
from tests.passes.stepwise import cases, check, stepwise

BUDGETS = ((0.5, 0.5), (5, 3), (0.2, 0.3), (0, 6), (0.3, 4), (100, 0.1))


@pytest.mark.parametrize("budgets", BUDGETS, ids=str)
def test_heavy_recent(model: Any, budgets: tuple[float, float]) -> None:
    check(model, [HeavyRecent(*budgets)], lambda: kv.HeavyRecent(*budgets), prompts=PROMPTS[1:5])


@pytest.mark.slow
def test_heavy_recent_over_a_long_answer(gqa: Any) -> None:
    prompts = ({"batch": 2, "padding": "left", "images_per_row": [1, 0]},)
    check(gqa, [HeavyRecent()], lambda: kv.HeavyRecent(0.5, 0.5), prompts=prompts, steps=45)
    check(gqa, [HeavyRecent(6, 8)], lambda: kv.HeavyRecent(6, 8), prompts=prompts, steps=45)


@pytest.mark.parametrize(("heavy", "recent"), [(0.5, 0.5), (9, 7)])
def test_a_cache_is_bounded_however_long_the_answer_is(gqa: Any, heavy: float, recent: float) -> None:
    optimized = optimize(gqa, [CutVisual(3), HeavyRecent(heavy, recent)])
    inputs = random_inputs(gqa, batch=2, text_tokens=15)
    _, _, cache = stepwise(optimized, inputs, torch.full((2, 1), 5))
    token = torch.full((2, 1), 5)
    whole = [inputs["input_ids"].shape[1]] * 3 + [15]  # the last layer has text alone
    most = [16] * 4 if heavy == 9 else whole
    pointers = set()
    for _ in range(300):
        with torch.inference_mode():
            optimized(input_ids=token, past_key_values=cache)
        assert [cache.evicting[layer].k.buffer.shape[2] for layer in range(4)] == most
        pointers.add(tuple(part.buffer.data_ptr() for layer in cache.evicting.values() for part in layer.parts))
    assert cache.nbytes() == foveate.cost(optimized.program, text_tokens=15, batch=2, new_tokens=301).kv_bytes
    assert len(pointers) == 1, "steps write in place"
    assert not cache.text


def test_of_equal_sums_the_later_token_leaves() -> None:
    """And free slots are taken first, of each row its own budget."""
    numbers = torch.arange(4).expand(2, 1, 4)
    places = numbers.masked_fill(torch.tensor([[[False] * 4], [[False, False, False, True]]]), PAD)
    sums = torch.tensor([[[2.0, 1.0, 1.0, 9.0]], [[3.0, 1.0, 5.0, 0.0]]])
    k = torch.zeros(2, 1, 4, 2)
    cache = HeavyRecentCache(k, k, places, sums, torch.tensor([[3, 1], [3, 2]]))
    assert [part.buffer.shape[2] for part in cache.parts] == [5] * 4
    new, paid = torch.ones(2, 1, 1, 2), torch.zeros(2, 1, 5)
    cache.step(new, new, paid)
    assert cache.numbers.view()[:, 0].tolist() == [[0, 1, 4, 3, PAD], [0, 1, 2, 3, PAD]]
    cache.step(new, new, torch.cat([paid, paid[..., :1]], 2))
    assert cache.numbers.view()[:, 0].tolist() == [[0, 1, 5, 3, PAD], [0, 1, 2, 3, 4]]
    cache.step(new, new, torch.cat([paid, paid[..., :1]], 2))
    assert cache.numbers.view()[:, 0].tolist() == [[0, 1, 6, 3, PAD], [0, 1, 2, 5, 4]]
    assert cache.k.view()[0, 0, :, 0].tolist() == [0, 0, 1, 0, 0]


def test_steps_that_evict_are_not_captured(gqa: Any) -> None:
    optimized = optimize(gqa, [HeavyRecent()])
    with pytest.raises(InputError, match="captured"):
        optimized.capture_steps()


@pytest.mark.slow
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    case=cases(),
    heavy=st.integers(0, 20) | st.floats(0.05, 0.95),
    recent=st.integers(1, 20) | st.floats(0.05, 0.95),
)
def test_any_heavy_recent(case: Any, heavy: float, recent: float) -> None:
    check(case[0], [HeavyRecent(heavy, recent)], lambda: kv.HeavyRecent(heavy, recent), prompts=[case[1]], steps=6)
