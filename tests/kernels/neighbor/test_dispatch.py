"""The plan of neighbour attention: deterministic, explained, and its FLOPs those that are computed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from foveate import ops
from foveate.errors import InputError
from foveate.kernels import counting
from foveate.kernels.neighbor import dispatch
from foveate.machine import thread_count
from foveate.neighborhood import METRICS, Call, Grid, plan, read_grids
from tests.kernels.neighbor.cases import Case, Prompt, case

PROMPTS: list[list[Prompt]] = [[[(0, 24, 24)]], [[(5, 12, 16), (2, 3, 5)], [(4, 9, 9)]], [[(3, 1, 30)]]]


def cpu(tokens: int, radius: int, **more: Any) -> Call:
    return Call(
        **{
            "device": "cpu",
            "dtype": torch.float32,
            "batch": 1,
            "heads": 8,
            "kv_heads": 8,
            "size": 64,
            "tokens": tokens,
            "text": 0,
            "radius": radius,
            "metric": "chebyshev",
            "causal": True,
            **more,
        }
    )


def square(side: int) -> tuple[Grid, ...]:
    return (Grid(0, 0, side, side, 0, 0),)


def executed(x: Case) -> int:
    """FLOPs of the attention calls that the plain implementation makes."""

    def count(q: Any, k: Any, v: Any, *rest: Any, out_shape: Any = None, **also: Any) -> int:
        return sdpa_flop_count(q, k, v)

    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: count}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        dispatch.neighbor_attention(**x.arguments)
    return counter.get_total_flops()


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("radius", [1, 3, 40])
@pytest.mark.parametrize("causal", [True, False])
def test_flops_are_those_that_are_executed(prompts: list[Prompt], metric: str, radius: int, causal: bool) -> None:
    x = case(prompts, radius, metric, causal, heads=(4, 2), size=16)
    with thread_count(2):
        by_products = executed(x)
    flops = executed(x)
    assert flops == by_products > 0
    assert counting.FLOPS["neighbor_attention"](**x.arguments) == flops
    with FlopCounterMode(display=False) as counter:
        ops.neighbor_attention(**x.arguments)
    assert counter.get_total_flops() == flops


def test_flops_of_kept_tokens_are_those_of_all_pairs() -> None:
    x = case([[(5, 12, 12)]], 2, heads=(4, 2), size=16).keeping(torch.arange(100))
    assert counting.FLOPS["neighbor_attention"](**x.arguments) == 4 * 4 * 16 * 100 * 105 == executed(x)


@pytest.mark.parametrize("side", [24, 48, 64])
def test_small_windows_are_tiles_on_a_cpu_and_fewer_flops_than_dense(side: int) -> None:
    chosen = plan(cpu(side * side, 2), square(side))
    assert chosen.form == "tiles"
    assert chosen.pairs < side**4 / 6
    assert plan.__wrapped__(cpu(side * side, 2), square(side)) == chosen, "nothing but the integers decides"


def test_a_window_over_the_whole_image_is_one_causal_call() -> None:
    chosen = plan(cpu(576, 23), square(24))
    assert chosen.form == "blocks"
    assert [block.kind for block in chosen.layout] == ["causal"]
    assert [block.kind for block in plan(cpu(576, 23, causal=False), square(24)).layout] == ["all"]


def test_on_a_gpu_few_tokens_stay_dense_and_many_go_to_triton() -> None:
    small, large = cpu(576, 2, device="cuda"), cpu(4096, 2, device="cuda")
    dense = plan(small, square(24))
    assert dense.form == "blocks"
    assert len(dense.layout) == 1
    assert plan(large, square(64)).form == "triton"
    without = plan(large, square(64), "is not there")
    assert without.form == "tiles"
    assert dict(without.rejected)["triton"] == "is not there"
    assert plan(large, None).form == "blocks"


def test_the_choice_is_explained() -> None:
    names = ("q", "k", "grids", "radius", "metric", "causal")
    x = case([[(3, 16, 16)]], 2)
    text = dispatch.planned(*(x.arguments[name] for name in names)).explain()
    assert text.splitlines()[0].split(":")[0] in ("tiles", "blocks")
    assert "chosen" in text.splitlines()[0]
    assert "predicted" in text
    assert "triton: does not run on cpu" in text
    pruned = x.keeping(torch.arange(9))
    text = dispatch.planned(*(pruned.arguments[name] for name in names)).explain()
    assert text.startswith("blocks: chosen, 1 blocks of queries")
    assert "tiles: no grid is promised" in text


def test_every_form_that_is_planned_has_an_implementation() -> None:
    for radius in (1, 5, 40):
        for grids in (square(24), None):
            for call in (cpu(576, radius), cpu(576, radius, device="cuda")):
                assert plan(call, grids).form in dispatch.FORMS


def test_the_promise_is_about_the_longest_row() -> None:
    rows = [[0, 0, 4, 5, 0, 0], [1, 0, 2, 2, 0, 0], [1, 4, 0, 9, 0, 0]]
    grids = read_grids(rows, 20)
    assert grids is not None
    assert [grid.tokens for grid in grids] == [20, 4], "an image without tokens is none"
    assert read_grids(rows, 21) is None
    assert read_grids(rows, 19) is None
    assert read_grids([], 0) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metric": "manhattan"}, "metric of neighbor_attention must be one of chebyshev, euclidean, raster"),
        ({"radius": -1}, "radius of neighbor_attention must not be negative, it is -1"),
        ({"grids": torch.tensor([[3, 0, 6, 6, 0, 0]])}, "outside its 1 batch rows and 3 text keys"),
        ({"grids": torch.tensor([[0, 0, 6, 6, 0, 4]])}, "outside its 1 batch rows and 3 text keys"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    x = case([[(3, 6, 6)]], 2).changed(**change)
    with pytest.raises(InputError, match=message):
        ops.neighbor_attention(**x.arguments)


def test_visual_queries_and_keys_must_be_the_same_tokens() -> None:
    x = case([[(3, 6, 6)]], 2)
    with pytest.raises(InputError, match="30 visual queries and 36 visual keys"):
        ops.neighbor_attention(**x.changed(q=x.arguments["q"][:, :, :30]).arguments)


def test_the_op_gives_what_its_fake_promises() -> None:
    for x in (case([[(3, 6, 6)]], 2), case([[(3, 6, 6)]], 2).keeping(torch.arange(9))):
        arguments = tuple(x.arguments.values())
        torch.library.opcheck(ops.neighbor_attention, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_plan_of_a_forecast_is_the_plan_of_the_run() -> None:
    x = case([[(3, 16, 16)]], 2, heads=(8, 4), size=64)
    forecast = cpu(256, 2, kv_heads=4, text=3)
    assert x.described() == (forecast, (Grid(0, 0, 16, 16, 0, 3),))
    assert replace(forecast, radius=15, text=0).covers(Grid(0, 0, 16, 16, 0, 0))
