"""Property: any legal pipeline on any small model and prompt equals the masked oracle, decoding included."""

import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.models.random import random_llava
from foveate.passes import (
    CutVisual,
    DropVisualHeads,
    DropVisualNeurons,
    FastV,
    GridPrune,
    NeighborAttention,
    Pass,
    PyramidDrop,
    RandomPrune,
)
from tests.oracle.masks import Masks, Neighbors, Prune
from tests.passes.check import check_pass
from tests.passes.test_vision import METHODS

FFN = 48
SHAPES = [(4, 4), (4, 2), (6, 2), (4, 1)]
SELECTIONS = (
    (FastV, "fastv"),
    (GridPrune, "given"),
    (lambda layer, keep: RandomPrune(layer, keep, seed=7), "given"),
    (lambda layer, keep: PyramidDrop((layer,), keep), "pyramid"),
)
"""Each method that selects before one layer, and what the oracle calls it."""
_MODELS = {}


def small_model(layers: int, heads: int, kv_heads: int):
    key = (layers, heads, kv_heads)
    if key not in _MODELS:
        _MODELS[key] = random_llava(
            layers=layers, hidden=heads * 8, heads=heads, kv_heads=kv_heads, ffn=FFN, visual_tokens=16
        )
    return _MODELS[key]


@st.composite
def cases(draw):
    """A model, a legal pipeline in random order, and the masks that mean the same."""
    layers = draw(st.integers(2, 4))
    heads, kv_heads = draw(st.sampled_from(SHAPES))
    passes: list[Pass] = []
    masks = Masks()
    fields = {}
    prunes = []
    cut = draw(st.none() | st.integers(1, layers - 1))
    if cut is not None:
        passes.append(CutVisual(cut))
        fields["cut_from"] = cut
    end = layers if cut is None else cut
    if draw(st.booleans()):
        mask = torch.tensor(
            draw(st.lists(st.lists(st.booleans(), min_size=heads, max_size=heads), min_size=layers, max_size=layers))
        )
        mask[:, draw(st.integers(0, heads - 1))] = True  # selections need a head that sees the image
        if not mask[:end].all():
            passes.append(DropVisualHeads(mask=mask, from_layer=0))
            fields["heads"] = mask
    if draw(st.booleans()):
        keep = draw(st.sampled_from([0.25, 0.5, 0.9]))
        neurons = torch.zeros(layers, FFN, dtype=torch.bool)
        neurons[:, : int(keep * FFN)] = True
        if end > 1:
            passes.append(DropVisualNeurons(keep))
            fields["neurons"] = neurons
    for layer in draw(st.lists(st.integers(1, layers - 1), unique=True, max_size=2)):
        keep = draw(st.sampled_from([0.1, 0.34, 0.5, 0.8]))
        if layer < end:
            method, choose = draw(st.sampled_from(SELECTIONS))
            passes.append(method(layer, keep))
            prunes.append(Prune(layer, keep, choose, of=layer))
    method, vision = draw(st.sampled_from([(None, None), *METHODS.values()]))
    if method is not None:
        passes.append(method)
    if draw(st.booleans()) and end > 1:
        options = {
            "radius": draw(st.integers(0, 2)),
            "metric": draw(st.sampled_from(["chebyshev", "euclidean", "raster"])),
            "causal": draw(st.booleans()),
            "see_prefix": draw(st.booleans()),
        }
        passes.append(NeighborAttention(**options))
        fields["neighbors"] = Neighbors((4, 4), **options)
    # A cut must not come before a selection in the pipeline; every other order is legal.
    passes = draw(st.permutations(passes))
    passes = [p for p in passes if not isinstance(p, CutVisual)] + [p for p in passes if isinstance(p, CutVisual)]
    masks = Masks(**fields, prunes=tuple(sorted(prunes, key=lambda p: p.layer)))
    prompt = draw(
        st.sampled_from(
            [
                {},
                {"batch": 2, "images": 2},
                {"batch": 3, "images_per_row": [1, 0, 2], "padding": "left"},
                {"batch": 2, "padding": "right", "text_tokens": 9},
                {"batch": 2, "images": 0},
                {"prefix": 0, "text_tokens": 3},
            ]
        )
    )
    return (layers, heads, kv_heads), passes, masks, prompt, vision


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(cases())
def test_any_pipeline_equals_the_masked_oracle(case):
    shape, passes, masks, prompt, vision = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_pass(small_model(*shape), passes, masks, [prompt], vision)
