"""Selections: equal to the masked oracle, and what they keep is what their papers' formulas keep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.errors import PassError
from foveate.models.random import random_inputs, random_llava
from foveate.passes import (
    DART,
    CutVisual,
    DropVisualHeads,
    DropVisualNeurons,
    FastV,
    GridPrune,
    NeighborAttention,
    PyramidDrop,
    SparseVLM,
)
from tests.oracle import guided
from tests.oracle.masks import Masks, Prune
from tests.passes.check import check_pass, optimize
from tests.passes.conftest import FFN, HEADS, LAYERS

FEW: tuple[dict[str, Any], ...] = (
    {},
    {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"},
    {"batch": 2, "images": 3, "text_tokens": 17},
    {"batch": 2, "images": 0},
)


def given(layer: int, keep: float) -> Prune:
    return Prune(layer, keep, "given")


@pytest.mark.parametrize("layer", [0, 2])
def test_grid_prune(gqa: Any, layer: int) -> None:
    check_pass(gqa, [GridPrune(layer, 0.4)], Masks(prunes=(given(layer, 0.4),)), FEW)


def stages(layers: tuple[int, ...], keep: float) -> Masks:
    first = layers[0]
    return Masks(prunes=tuple(Prune(layer, keep**stage, "pyramid", of=first) for stage, layer in enumerate(layers, 1)))


@pytest.mark.slow
def test_pyramiddrop(model: Any) -> None:
    check_pass(model, [PyramidDrop((1, 2, 3), 0.5)], stages((1, 2, 3), 0.5), FEW)


@pytest.mark.parametrize(("layers", "keep"), [((0, 3), 0.7), ((2,), 0.3)])
def test_pyramiddrop_in_other_stages(gqa: Any, layers: tuple[int, ...], keep: float) -> None:
    check_pass(gqa, [PyramidDrop(layers, keep)], stages(layers, keep), FEW[:1])


def by_raters(layers: tuple[int, ...], keeps: tuple[float, ...], recycle: bool = True) -> Masks:
    prunes = (
        Prune(layer + 1, keep, "by", by=guided.sparsevlm(keep, layers[0] + 1, recycle))
        for layer, keep in zip(layers, keeps)
    )
    return Masks(prunes=tuple(prunes))


@pytest.mark.slow
@pytest.mark.parametrize("recycle", [True, False])
def test_sparsevlm(model: Any, recycle: bool) -> None:
    layers, keeps = (0, 1, 2), (0.7, 0.4, 0.15)
    check_pass(model, [SparseVLM(layers, keeps=keeps, recycle=recycle)], by_raters(layers, keeps, recycle), FEW)


@pytest.mark.slow
def test_sparsevlm_behind_another_selection(gqa: Any) -> None:
    masks = Masks(prunes=(Prune(1, 0.9, "fastv"), *by_raters((1, 2), (0.6, 0.1)).prunes))
    check_pass(gqa, [FastV(1, 0.9), SparseVLM((1, 2), keeps=(0.6, 0.1))], masks, FEW[:2])
    check_pass(gqa, [SparseVLM((1, 2), keeps=(0.6, 0.1)), FastV(1, 0.9)], masks, FEW[1:2])


@pytest.mark.slow
@pytest.mark.parametrize("recycle", [True, False])
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_sparsevlm_by_rank(model: Any, recycle: bool, scale: float) -> None:
    one = SparseVLM((0, 1, 2), recycle=recycle, counts="rank", scale=scale)
    by = (Prune(layer + 1, 1.0, "by", by=guided.sparsevlm(1.0, 1, recycle, scale)) for layer in (0, 1, 2))
    optimized = check_pass(model, [one], Masks(prunes=tuple(by)), FEW)
    with torch.inference_mode():
        kept = optimized(**random_inputs(model, batch=2, images=3, text_tokens=17)).kept
    # Fewer places than tokens that reached the stage, more than tokens: the rest is padding.
    assert all(48 > places.shape[1] > 0 for places in kept.values())
    assert sorted(kept) == [1, 2, 3]


def test_sparsevlm_by_rank_with_everything_else(gqa: Any) -> None:
    mask = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    mask[1:, 1:3] = False
    one = SparseVLM((1,), counts="rank", scale=0.6, recycle=False)
    prunes = (Prune(1, 0.9, "fastv"), Prune(2, 1.0, "by", by=guided.sparsevlm(1.0, 1, False, 0.6)))
    masks = Masks(cut_from=3, heads=mask, prunes=prunes)
    for passes in (
        [DropVisualHeads(mask=mask, from_layer=1), FastV(1, 0.9), one, CutVisual(3)],
        [one, FastV(1, 0.9), DropVisualHeads(mask=mask, from_layer=1), CutVisual(3)],
    ):
        check_pass(gqa, passes, masks, FEW[:2])


@pytest.mark.slow
def test_sparsevlm_when_clusters_are_many() -> None:
    wide = random_llava(layers=2, visual_tokens=64, seed=3)
    check_pass(wide, [SparseVLM((0,), keeps=(0.1,))], by_raters((0,), (0.1,)), FEW[:2])


@pytest.mark.slow
@pytest.mark.parametrize(("budget", "counts"), [(192, (300, 200, 110)), (128, (303, 110, 36)), (64, (66, 30, 17))])
def test_the_stages_of_sparsevlm_are_its_codes(budget: int, counts: tuple[int, ...]) -> None:
    deep = random_llava(layers=17, hidden=32, heads=2, ffn=32, visual_tokens=576, vision_layers=1, vision_hidden=16)
    optimized = optimize(deep, [SparseVLM(budget=budget, recycle=False)])
    with torch.inference_mode():
        kept = optimized(**random_inputs(deep)).kept
    assert {layer: places.shape[1] for layer, places in kept.items()} == dict(zip((3, 7, 16), counts))


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "keep"), [(1, 0.6), (3, 0.3)])
def test_dart(model: Any, layer: int, keep: float) -> None:
    weight = model.model.language_model.norm.weight
    masks = Masks(prunes=(Prune(layer, keep, "by", by=guided.dart(keep, weight)),))
    check_pass(model, [DART(layer, keep)], masks, FEW)
    masks = Masks(prunes=(Prune(layer, keep, "by", by=guided.dart(keep, weight, 2)),))
    check_pass(model, [DART(layer, keep, 2)], masks, FEW[:1])


@pytest.mark.slow
def test_the_stages_of_pyramiddrop_are_the_papers() -> None:
    deep = random_llava(layers=32, hidden=32, heads=2, ffn=32, visual_tokens=576, vision_layers=1, vision_hidden=16)
    optimized = optimize(deep, [PyramidDrop()])
    with torch.inference_mode():
        kept = optimized(**random_inputs(deep)).kept
    assert {layer: places.shape[1] for layer, places in kept.items()} == {8: 288, 16: 144, 24: 72}


@pytest.mark.slow
def test_selections_with_everything_else(gqa: Any) -> None:
    """Each other pass before and after each selection, in one pipeline a selection."""
    mask = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    mask[2:, 1:3] = False
    neurons = torch.zeros(LAYERS, FFN, dtype=torch.bool)
    neurons[:, : FFN // 2] = True
    for selection, prune in (
        (PyramidDrop((1, 2), 0.6), (Prune(1, 0.6, "pyramid", of=1), Prune(2, 0.36, "pyramid", of=1))),
        (GridPrune(2, 0.5), (given(2, 0.5),)),
        (DART(1, 0.5), (given(1, 0.5),)),
        (SparseVLM((1,), keeps=(0.5,), recycle=False), by_raters((1,), (0.5,), False).prunes),
    ):
        masks = Masks(cut_from=3, heads=mask, neurons=neurons, prunes=prune)
        passes = [DropVisualHeads(mask=mask), selection, DropVisualNeurons(0.5), CutVisual(3)]
        check_pass(gqa, passes, masks, FEW[1:2])
        passes = [CutVisual(3), DropVisualNeurons(0.5), selection, DropVisualHeads(mask=mask)]
        check_pass(gqa, passes, masks, FEW[:1])


@pytest.mark.parametrize("selection", [PyramidDrop((1, 2), 0.6), GridPrune(1, 0.5)])
def test_neighbours_are_those_on_the_grid_whatever_is_left(mha: Any, selection: Any) -> None:
    inputs = random_inputs(mha, batch=2)
    with torch.inference_mode():
        pair = [
            optimize(mha, [first, second])(**inputs).logits
            for first, second in (
                (NeighborAttention(1, layers=(1, 2, 3)), selection),
                (selection, NeighborAttention(1, layers=(1, 2, 3))),
            )
        ]
    torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_tiny_shares(gqa: Any) -> None:
    for keep in (0.001, 1e-5):
        check_pass(gqa, [FastV(1, keep)], Masks(prunes=(Prune(1, keep, "fastv"),)), FEW[:1])
    check_pass(gqa, [PyramidDrop((1, 2, 3), 0.04)], stages((1, 2, 3), 0.04), FEW[:1])


BAD = {
    "fastv{keep=1e-9}": "leaves no visual token; cut-visual{from_layer=2} says so",
    "pyramiddrop{layers=[2,1]}": "layer numbers that rise",
    "pyramiddrop{layers=[9]}": "layer 9 is not one of this model's 4",
    "pyramiddrop{keep=0}": "above 0, at most 1",
    "pyramiddrop{layers=3}": "layer numbers that rise",
    "cut-visual{from_layer=2},pyramiddrop": "cut at layer 2",
    "random-prune{layer=0},grid-prune{layer=0}": "already selected before layer 0",
    "grid-prune{layer=7}": "0 to 3",
    "dart{layer=0}": "1 to 3",
    "dart{pivots=0}": "1 or more",
    "sparsevlm": "behind layer 15 there is none; allowed: 0 to 2",
    "sparsevlm{layers=[2,1]}": "layer numbers that rise",
    "sparsevlm{budget=100}": "192, 128, 64",
    "sparsevlm{layers=[1],counts=rank}": "above 0, at most 1",
    "sparsevlm{layers=[1],counts=rank,scale=2}": "above 0, at most 1",
    "sparsevlm{layers=[1],counts=rank,scale=0.5,keeps=[0.5]}": "they belong to counts=code",
    "sparsevlm{layers=[1],counts=few}": "code, rank",
    "sparsevlm{layers=[1],keeps=[0.5],scale=0.5}": "none but with counts=rank",
    "sparsevlm{layers=[1],keeps=[0.5,0.2]}": "1 shares above 0",
    "sparsevlm{layers=[0,1],keeps=[0.2,0.5]}": "do not rise",
    "fastv{layer=2},sparsevlm{layers=[1],keeps=[0.5]}": "already selected before layer 2",
    "grid-prune{layer=-1}": "0 or more",
}


@pytest.mark.parametrize("passes", BAD)
def test_bad_options_are_refused(mha: Any, passes: str) -> None:
    with pytest.raises(PassError) as error:
        optimize(mha, passes)
    assert BAD[passes] in str(error.value)


def test_the_method_that_the_docs_add_keeps_what_it_says(gqa: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "selection.md").read_text()
    *_, block = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(block.partition("\n\n\nopt =")[0], names)
    inputs = random_inputs(gqa, seed=5)
    with torch.inference_mode():
        kept = optimize(gqa, [names["NormPrune"](layer=3, keep=0.25)])(**inputs).kept[3][0]
        hidden = gqa(**inputs, output_hidden_states=True).hidden_states[3][0]
    places = (inputs["input_ids"][0] == gqa.config.image_token_id).nonzero()[:, 0]
    best = hidden[places].norm(dim=-1).argsort(descending=True)[: len(places) // 4]
    assert kept.tolist() == places[best].sort().values.tolist()
