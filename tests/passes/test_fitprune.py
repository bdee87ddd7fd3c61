"""FitPrune: equal to the masked oracle, its schedules to a plain reading of the paper and to the published one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.calibrate import calibrate
from foveate.errors import FoveateWarning, PassError
from foveate.ir.fit import find_schedule, visual_share
from foveate.ir.program import ModelInfo
from foveate.ir.statistics import Statistics
from foveate.models.random import random_inputs, random_llava
from foveate.passes import (
    CutVisual,
    DivPrune,
    DropVisualHeads,
    DropVisualNeurons,
    FastV,
    FitPrune,
    GridPrune,
    NeighborAttention,
    PyramidDrop,
)
from foveate.passes.select.fitprune import PUBLISHED
from tests.oracle import fit
from tests.oracle.masks import Masks, Neighbors, Prune
from tests.passes.check import check_pass, optimize, traced
from tests.passes.conftest import FFN, HEADS, LAYERS
from tests.passes.test_select import FEW
from tests.passes.test_vision import METHODS
from tests.small_digits import small_digits
from tests.test_calibrate import examples

SCHEDULE = (3, 0, 5, 4)
"""Of 16 tokens; the last layer's deletions do nothing."""
PRUNES = fit.scheduled(list(SCHEDULE), 16)


@pytest.mark.slow
def test_a_schedule(model: Any) -> None:
    check_pass(model, [FitPrune(schedule=SCHEDULE)], Masks(prunes=PRUNES))


@pytest.mark.slow
def test_layers_one_after_another(gqa: Any) -> None:
    check_pass(gqa, [FitPrune(schedule=(1, 1, 13, 0))], Masks(prunes=fit.scheduled([1, 1, 13, 0], 16)), FEW)


def test_what_a_layer_deletes_is_in_its_cache_and_in_no_later_one(gqa: Any) -> None:
    optimized = optimize(gqa, [FitPrune(schedule=SCHEDULE)])
    with torch.inference_mode():
        out = optimized(**random_inputs(gqa))
    assert [out.past_key_values.fixed[f"visual_k_{layer}"].shape[2] for layer in range(LAYERS)] == [16, 13, 13, 8]
    assert {layer: places.shape[1] for layer, places in out.kept.items()} == {1: 13, 3: 8}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("renorm", [True, False])
def test_with_everything_else(gqa: Any, order: int, renorm: bool) -> None:
    heads = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    heads[1:, 1:3] = False
    neurons = torch.zeros(LAYERS, FFN, dtype=torch.bool)
    neurons[:, : FFN // 2] = True
    masks = Masks(cut_from=3, heads=heads, neurons=neurons, renorm=renorm)
    masks = replace(masks, prunes=fit.scheduled([2, 3, 0, 0], 16, heads))
    passes = [DropVisualHeads(mask=heads, from_layer=1, renorm=renorm), FitPrune(schedule=(2, 3, 0, 0))]
    check_pass(gqa, [*passes, DropVisualNeurons(0.5)][::order] + [CutVisual(3)], masks, FEW[:2])


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("options", [{}, {"metric": "euclidean", "causal": True}, {"see_prefix": False}])
def test_with_neighbours(gqa: Any, order: int, options: dict[str, Any]) -> None:
    masks = Masks(neighbors=Neighbors((4, 4), 1, **options), prunes=PRUNES)
    check_pass(gqa, [NeighborAttention(1, **options), FitPrune(schedule=SCHEDULE)][::order], masks, FEW[:3])


def test_with_neighbours_and_fewer_heads(gqa: Any) -> None:
    heads = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    heads[:, 2:] = False
    masks = Masks(neighbors=Neighbors((4, 4), 1), heads=heads, prunes=fit.scheduled(list(SCHEDULE), 16, heads))
    passes = [NeighborAttention(1), FitPrune(schedule=SCHEDULE), DropVisualHeads(mask=heads, from_layer=0)]
    for several in (passes, passes[::-1], [passes[1], passes[2], passes[0]]):
        check_pass(gqa, several, masks, FEW[:2])


@pytest.mark.slow
def test_with_other_selections(gqa: Any) -> None:
    one = FitPrune(schedule=(0, 0, 6, 0))
    (last,) = fit.scheduled([0, 0, 6, 0], 16)
    for other, prune in (
        (FastV(1, 0.8), Prune(1, 0.8, "fastv")),
        (FastV(2, 0.8), Prune(2, 0.8, "fastv")),
        (PyramidDrop((2,), 0.9), Prune(2, 0.9, "pyramid", of=2)),
        (GridPrune(2, 0.75), Prune(2, 0.75, "given")),
    ):
        masks = Masks(prunes=(prune, last))
        check_pass(gqa, [other, one], masks, FEW[:2])
        whole = replace(masks, prunes=(prune, fit.fitprune(2, (10 + 1e-6) / 16, 3)))
        check_pass(gqa, [one, other], whole, FEW[:2])
    first = fit.scheduled([4, 0, 0, 0], 16)
    masks = Masks(prunes=(*first, Prune(3, 0.5, "fastv")))
    for passes in ([FitPrune(schedule=(4, 0, 0, 0)), FastV(3, 0.5)], [FastV(3, 0.5), FitPrune(schedule=(4, 0, 0, 0))]):
        check_pass(gqa, passes, masks, FEW)


def test_behind_the_vision_tower(gqa: Any) -> None:
    """Shares of what an image has left: 0.4 of 16 are 6."""
    _, oracle = METHODS["divprune"]
    check_pass(gqa, [DivPrune(0.4), FitPrune(schedule=SCHEDULE)], Masks(prunes=PRUNES), FEW[:2], oracle)


@pytest.mark.slow
def test_a_saved_program_deletes_the_same(gqa: Any, tmp_path: Path) -> None:
    inputs = random_inputs(gqa, batch=3, images_per_row=[2, 0, 1], padding="left")
    optimized = optimize(gqa, [FitPrune(schedule=SCHEDULE)])
    optimized.save_pretrained(tmp_path / "x")
    with torch.inference_mode():
        expected, found = optimized(**inputs), foveate.load(tmp_path / "x")(**inputs)
    torch.testing.assert_close(expected.logits, found.logits)
    assert all(torch.equal(expected.kept[layer], found.kept[layer]) for layer in (1, 3))


def drawn(info: ModelInfo, counts: list[int], seed: int) -> tuple[Statistics, list[fit.Sample]]:
    """Random statistics of samples with so many visual tokens; a few tokens receive nothing, and some the same."""
    draw = torch.Generator().manual_seed(seed)
    cross, own = (torch.rand(sum(counts), info.layers, generator=draw) ** 4 for _ in range(2))
    cross[::5] = 0
    own[1::7] = own[1, 0]
    empty = Statistics.empty(info, tokens=True)
    found = replace(empty, visual=torch.tensor(counts), cross=cross, own=own)
    samples, start = [], 0
    for count in counts:
        part = slice(start, start + count)
        samples.append([(cross[part, layer].tolist(), own[part, layer].tolist()) for layer in range(info.layers)])
        start += count
    return found, samples


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("counts", [[16] * 4, [16, 32, 3, 1]])
def test_the_search_is_a_plain_reading_of_the_paper(model: Any, seed: int, counts: list[int]) -> None:
    info = traced(model).info
    found, samples = drawn(info, counts, seed)
    d, kv, m = info.hidden_size, info.kv_heads * info.head_dim, info.intermediate_size

    def cost(entering: int, leaving: int) -> float:
        return entering * (d * d + 2 * d * kv) + 2 * entering**2 * d + leaving * (d * d + 3 * d * m)

    for budget in (0.3, 0.4, 0.65, 0.9):
        assert list(find_schedule(found, info, budget)) == fit.schedule(samples, budget, cost, 16)


@pytest.mark.slow
def test_calibrated_budgets(tmp_path: Path) -> None:
    source, processor = small_digits(4)
    found = calibrate(source, processor, examples(), batch=2, tokens=True)
    found.save(tmp_path / "x.safetensors")
    info = foveate.trace(source).info
    shares = []
    for budget in (0.8, 0.5):
        schedule = find_schedule(found, info, budget)
        by_file = foveate.optimize(source, [FitPrune(budget, stats=str(tmp_path / "x.safetensors"))])
        given = foveate.optimize(source, [FitPrune(schedule=schedule)])
        assert by_file.program.to_text() == given.program.to_text()
        left = info.tokens_per_image - torch.tensor([0, *schedule]).cumsum(0)
        shares.append(visual_share(info, left[None]))
        assert budget - 0.1 < shares[-1] < budget + 0.02
    with pytest.raises(PassError, match=r"budget=0.01: the first layer alone takes"):
        foveate.optimize(source, "fitprune{budget=0.01}", found)
    with pytest.raises(PassError, match="do not tell tokens apart: `foveate calibrate --tokens`"):
        foveate.optimize(source, "fitprune", replace(found, visual=None, cross=None, own=None))


def test_what_calibration_says_of_tokens_is_what_eager_attention_says() -> None:
    source, processor = small_digits()
    found = calibrate(source, processor, examples(), batch=2, tokens=True)
    start = 0
    source.set_attn_implementation("eager")
    try:
        for number, example in enumerate(examples()):
            images = [image() if callable(image) else image for image in example.images]
            inputs = processor(text=[example.prompt], images=images, return_tensors="pt")
            with torch.no_grad():
                weights = source(**inputs, output_attentions=True, use_cache=False).attentions
            places = inputs["input_ids"][0] == source.config.image_token_id
            visual = places.nonzero()[:, 0].tolist()
            behind = list(range(visual[-1] + 1, len(places)))
            assert int(found.visual[number]) == len(visual)
            part = slice(start, start := start + len(visual))
            for layer, each in enumerate(weights):
                for name, expected in zip(("cross", "own"), fit.received(each[0], visual, behind), strict=True):
                    actual = getattr(found, name)[part, layer]
                    torch.testing.assert_close(actual, torch.tensor(expected), rtol=1e-4, atol=1e-6)
    finally:
        source.set_attn_implementation("sdpa")
    assert start == len(found.cross) == len(found.own)


@pytest.mark.slow
def test_the_published_schedule() -> None:
    deep = random_llava(layers=32, hidden=32, heads=2, ffn=32, visual_tokens=576, vision_layers=1, vision_hidden=16)
    optimized = optimize(deep, "fitprune{schedule=llava-1.5-7b}")
    with torch.inference_mode():
        kept = optimized(**random_inputs(deep)).kept
    counts = [kept[layer + 1].shape[1] if layer + 1 in kept else None for layer in range(32)]
    assert counts[:8] == [562, 529, 440, 404, 368, 348, 293, 272]
    assert [c for c in counts if c is not None][-1] == 576 - 449
    info = replace(traced(deep).info, heads=32, kv_heads=32, head_dim=128, hidden_size=4096)
    left = 576 - torch.tensor([0, *PUBLISHED["llava-1.5-7b"]]).cumsum(0)
    share = visual_share(replace(info, intermediate_size=11008), left[None])
    assert round(share, 3) == 0.403


BAD = {
    "fitprune": "budget=0.4 needs statistics",
    "fitprune{budget=0}": "above 0, below 1",
    "fitprune{schedule=[1,2]}": "a schedule of 2 layers that deletes 3 tokens",
    "fitprune{schedule=[1,5,5,5]}": "an image 16 tokens, of which one stays",
    "fitprune{schedule=[1,-1,0,0]}": "numbers of tokens, one a layer",
    "fitprune{schedule=gpt}": "one a layer, or llava-1.5-7b",
    "fitprune{schedule=llava-1.5-7b}": "a schedule of 32 layers that deletes 449 tokens",
    "fitprune{schedule=3}": "numbers of tokens, one a layer",
    "fitprune{schedule=[1,1,1,1],stats=x}": "give a schedule, or budget and stats",
    "fitprune{schedule=[1,1,1,1],budget=0.3}": "give a schedule, or budget and stats",
    "fastv{layer=2},fitprune{schedule=[0,3,0,0]}": "already selected before layer 2",
    "fitprune{schedule=[0,3,0,0]},fastv{layer=2}": "already selected before layer 2",
    "fitprune{schedule=[0,3,3,0]},cut-visual{from_layer=2}": "selected before layer 2",
    "fitprune{schedule=[0,3,0,0]},drop-visual-heads{keep=0,from_layer=1}": "keep at least one head",
}


@pytest.mark.parametrize("passes", BAD)
def test_bad_options_are_refused(mha: Any, passes: str) -> None:
    with pytest.raises(PassError) as error:
        optimize(mha, passes)
    assert BAD[passes] in str(error.value)


def test_a_layer_without_visual_attention_has_no_scores(mha: Any) -> None:
    heads = torch.ones(LAYERS, mha.config.text_config.num_attention_heads, dtype=torch.bool)
    heads[1] = False
    with pytest.raises(PassError, match="no head of layer 1 looks at visual tokens"):
        optimize(mha, [DropVisualHeads(mask=heads, from_layer=0), FitPrune(schedule=(0, 3, 0, 0))])


IDLE = ("fitprune{schedule=[0,0,0,9]}", "cut-visual{from_layer=2},fitprune{schedule=[0,3,2,0]}")


@pytest.mark.parametrize("passes", IDLE)
def test_nothing_to_delete_is_said(mha: Any, passes: str) -> None:
    with pytest.warns(FoveateWarning, match="before the last layer that sees the image"):
        optimize(mha, passes)
