"""Neighbour attention alone and with every other pass equals the masked oracle, wherever it stands in the pipeline."""

import itertools

import pytest
import torch

import foveate
from foveate import ops
from foveate.errors import FoveateWarning, PassError
from foveate.ir.attention import attentions
from foveate.models.random import random_inputs, random_llava
from foveate.passes import CutVisual, DropVisualHeads, DropVisualNeurons, FastV, NeighborAttention, RandomPrune
from tests.oracle.masks import Masks, Neighbors, Prune
from tests.passes.check import check_pass, optimize
from tests.passes.conftest import FFN, HEADS, LAYERS

SIDE = 4
"""Rows and columns of the images of the models here."""


def near(radius: int, **options) -> Neighbors:
    return Neighbors((SIDE, SIDE), radius, **options)


@pytest.mark.slow
@pytest.mark.parametrize("radius", [0, 1, 2, 9])
def test_a_window(model, radius):
    check_pass(model, [NeighborAttention(radius)], Masks(neighbors=near(radius)))


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["chebyshev", "euclidean", "raster"])
@pytest.mark.parametrize(("causal", "see_prefix"), list(itertools.product((True, False), repeat=2)))
def test_what_is_near_and_seen(gqa, metric, causal, see_prefix):
    options = {"metric": metric, "causal": causal, "see_prefix": see_prefix}
    check_pass(gqa, [NeighborAttention(2, **options)], Masks(neighbors=near(2, **options)))


def test_some_layers_only(mha):
    layers = (0, LAYERS - 2)
    optimized = check_pass(mha, [NeighborAttention(1, layers=layers)], Masks(neighbors=near(1, layers=layers)))
    targets = [node.target for node in attentions(optimized.program.prefill, stream="visual")]
    assert targets.count(ops.neighbor_attention) == 2 and targets.count(ops.attention) == LAYERS - 3
    assert "layers 0, 2: visual tokens see their neighbours within 1" in str(optimized.report())


PRUNES = (Prune(1, 0.6, "fastv"), Prune(3, 0.5, "given"))


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, 1, 2])
def test_before_between_and_after_selections(model, place):
    passes = [FastV(1, 0.6), RandomPrune(3, 0.5, seed=1)]
    passes.insert(place, NeighborAttention(1))
    check_pass(model, passes, Masks(neighbors=near(1), prunes=PRUNES))


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False])
def test_with_every_other_pass(model, first):
    mask = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    mask[1:, 1] = False
    neurons = torch.zeros(LAYERS, FFN, dtype=torch.bool)
    neurons[:, : FFN // 2] = True
    others = [DropVisualHeads(mask=mask, from_layer=1), DropVisualNeurons(0.5), FastV(1, 0.5), CutVisual(2)]
    near_pass = NeighborAttention(1)
    passes = [near_pass, *others] if first else [*others, near_pass]
    masks = Masks(cut_from=2, heads=mask, neurons=neurons, prunes=(Prune(1, 0.5, "fastv"),), neighbors=near(1))
    check_pass(model, passes, masks)


def test_coordinates_are_gathered_once_a_selection(mha):
    program = optimize(mha, [FastV(1, 0.5), NeighborAttention(1)]).program
    gathered = [n for n in program.prefill.nodes if n.meta["foveate"].role == "coords" and n.op == "call_function"]
    assert [n.target for n in gathered] == [ops.take_tokens]


@pytest.mark.slow
def test_inductor_equals_eager(gqa):
    text = "neighbor-attention{radius=1},drop-visual-neurons{keep=0.5}"
    eager, compiled = (foveate.optimize(gqa, text, backend=backend) for backend in ("eager", "inductor"))
    for prompt in ({}, {"batch": 2, "images_per_row": [1, 2], "padding": "left"}):
        inputs = random_inputs(gqa, **prompt)
        with torch.inference_mode():
            assert (eager(**inputs).logits - compiled(**inputs).logits).abs().max() < 1e-4


@pytest.mark.slow
def test_bfloat16_stays_close():
    exact, rough = (random_llava(layers=2, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    inputs = random_inputs(rough)
    with torch.inference_mode():
        a = optimize(exact, [NeighborAttention(1)])(**{**inputs, "pixel_values": inputs["pixel_values"].float()})
        b = optimize(rough, [NeighborAttention(1)])(**inputs)
    assert torch.nn.functional.cosine_similarity(a.logits, b.logits.float(), dim=-1).min() > 0.98


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"radius": -1}, "radius=-1; allowed: a number of tokens, 0 or more"),
        ({"radius": 1.5}, "radius=1.5"),
        ({"radius": 1, "metric": "manhattan"}, "allowed: chebyshev, euclidean, raster"),
        ({"radius": 1, "causal": 1}, "causal=1; allowed: true, false"),
        ({"radius": 1, "layers": []}, "layers"),
        ({"radius": 1, "layers": [1, "2"]}, "allowed: layer numbers"),
    ],
)
def test_wrong_options_are_named(options, said):
    with pytest.raises(PassError, match=said):
        NeighborAttention(**options)


def test_what_does_not_fit_the_program(mha):
    with pytest.raises(PassError, match=r"layers=9 is not a layer of this model; allowed: 0 to 3"):
        optimize(mha, [NeighborAttention(1, layers=[1, 9])])
    with pytest.raises(PassError, match="layer 0 look at their neighbours only already"):
        optimize(mha, [NeighborAttention(1), NeighborAttention(2)])
    with pytest.warns(FoveateWarning, match="no visual token looks at anything in these layers"):
        optimize(mha, [CutVisual(1), NeighborAttention(1, layers=[2])])
