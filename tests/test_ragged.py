"""Batches of very different lengths: run in groups, with the results of one run and the cost of the rows alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate import ragged
from foveate.models.random import random_inputs
from foveate.ragged import groups
from tests.models.prompts import made
from tests.models.test_running import source, traced

lengths = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 40)), min_size=1, max_size=7)


@settings(deadline=None, max_examples=60)
@given(rows=lengths, overhead=st.integers(0, 100))
def test_groups_hold_every_row_once_and_no_partition_by_length_costs_less(
    rows: list[tuple[int, int]], overhead: int
) -> None:
    visual, text = torch.tensor(rows).unbind(1)
    found = groups(visual, text, overhead)
    assert sorted(row for group in found for row in group) == list(range(len(rows)))

    def cost(parts: list[list[int]]) -> int:
        return sum(len(p) * (max(rows[r][0] for r in p) + max(rows[r][1] for r in p)) + overhead for p in parts)

    order = sorted(range(len(rows)), key=lambda row: (sum(rows[row]), rows[row]))
    for cuts in range(2 ** (len(rows) - 1)):
        parts: list[list[int]] = [[]]
        for place, row in enumerate(order):
            parts[-1].append(row)
            if cuts >> place & 1:
                parts.append([])
        assert cost(found) <= cost([part for part in parts if part])


def test_equal_rows_are_one_group() -> None:
    assert groups(torch.full((9,), 576), torch.full((9,), 60), 64) == [list(range(9))]
    assert groups(torch.tensor([2304, 64, 64, 64]), torch.tensor([20, 20, 30, 10]), 64) == [[1, 2, 3], [0]]


PIPELINES = (
    "",
    "neighbor-attention{radius=1}",
    "fastv{layer=1,keep=0.5},drop-visual-heads{keep=2,from_layer=1},drop-visual-neurons{keep=0.5}",
    "fastv{layer=1,keep=0.4},cut-visual{from_layer=2},neighbor-attention{radius=1,causal=true}",
)


@pytest.mark.parametrize("passes", PIPELINES)
@pytest.mark.parametrize("name", ["qwen2-vl", "internvl, phi3"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_results_are_those_of_one_run(name: str, passes: str, padding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = foveate.optimize(source(name), passes, traced=traced(name))
    for seed, rows in enumerate(([[4], [0], [1], [0]], [[0], [2], [2]], [[1], [1], [3], [0]])):
        inputs = made(source(name), seed, rows, padding).inputs
        found = []
        for overhead in (10**9, 0):
            monkeypatch.setattr(ragged, "OVERHEAD", {"cpu": overhead})
            with torch.no_grad():
                out = model(**inputs)
            answer = model.generate(**inputs, max_new_tokens=5, do_sample=False) if padding == "left" else None
            found.append((out, answer))
        (one, expected), (several, answer) = found
        torch.testing.assert_close(several.logits, one.logits, rtol=0, atol=1e-5)
        assert answer is None or torch.equal(answer, expected)
        for layer, places in (one.kept or {}).items():
            assert torch.equal(several.kept[layer], places)


def flops(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        model(**inputs)
    return int(counted.get_total_flops())


def test_one_long_and_three_short_prompts_cost_little_more_than_the_four_alone() -> None:
    name = "qwen2-vl"
    model = foveate.optimize(source(name), "", traced=traced(name))
    ids, grids = [], [[1, 48, 48], [1, 8, 8], [1, 6, 8], [1, 4, 4]]
    for frames, height, width in grids:
        ids.append([5] * 4 + [source(name).config.image_token_id] * (frames * height * width // 4) + [7] * 9)
    longest = max(map(len, ids))
    batch = {
        "input_ids": torch.tensor([[0] * (longest - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids]),
        "image_grid_thw": torch.tensor(grids),
    }
    patches = [torch.randn(h * w, 3 * 2 * 8 * 8) for _, h, w in grids]
    alone = [
        {"input_ids": torch.tensor([row]), "image_grid_thw": torch.tensor([grid]), "pixel_values": pixels}
        for row, grid, pixels in zip(ids, grids, patches, strict=True)
    ]
    together = flops(model, {**batch, "pixel_values": torch.cat(patches)})
    assert together <= 1.25 * sum(flops(model, inputs) for inputs in alone)


@pytest.mark.slow
def test_what_evicts_keys_is_run_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.models.random import random_llava

    monkeypatch.setattr(ragged, "OVERHEAD", {"cpu": 0})
    source_model = random_llava(layers=2)
    model = foveate.optimize(source_model, "snapkv{capacity=8,window=2}")
    inputs = random_inputs(source_model, batch=3, images_per_row=[2, 0, 1], padding="left")
    with torch.no_grad():
        assert model(**inputs).held is not None
