"""Selections and merges in the vision tower: equal to the Hugging Face modules on tokens that plain lists choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from foveate.errors import FoveateWarning, InputError, PassError
from foveate.models.random import random_inputs, random_llava
from foveate.models.registry import trace_program
from foveate.ops import PAD
from foveate.passes import (
    AveragePool,
    CutVisual,
    DivPrune,
    DropVisualHeads,
    DropVisualNeurons,
    FasterVLM,
    FastV,
    NeighborAttention,
    PruMerge,
    PyramidDrop,
    VisionZip,
    VisPruner,
)
from foveate.passes.pipeline import apply_pipeline
from tests.models.tiny import llava_onevision, qwen2_5_vl, qwen2_vl, qwen3_vl
from tests.oracle import vision
from tests.oracle.masked import masked_forward
from tests.oracle.masks import Masks, Neighbors, Prune
from tests.passes.check import Vision, check_gradients, check_pass, optimize
from tests.passes.conftest import FFN, HEADS, LAYERS

FEW = (
    {},
    {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"},
    {"batch": 2, "images": 3, "text_tokens": 17},
    {"batch": 2, "images": 0},
    {"batch": 3, "images_per_row": [1, 2, 1], "padding": "right", "prefix": 0},
)


def by(*methods: Callable[..., Any]) -> Vision:
    """The first method sees the tower; each further one is given projected tokens."""

    def tokens(model: Any, pixels: torch.Tensor) -> list[vision.Tokens]:
        found = vision.projected(model, methods[0](vision.see(model, pixels)))
        for method in methods[1:]:
            found = method(model, found)
        return found

    return tokens


def everything(seen: vision.Seen) -> list[vision.Tokens]:
    return [vision.Tokens(x[1:], list(range(x.shape[0] - 1))) for x in seen.features]


def diverse(keep: float) -> Callable[..., Any]:
    return lambda model, tokens: vision.divprune(model, tokens, keep)


METHODS: dict[str, tuple[Any, Vision]] = {
    "fastervlm": (FasterVLM(0.3), by(vision.fastervlm(0.3))),
    "divprune": (DivPrune(0.4), by(everything, diverse(0.4))),
    "vispruner": (VisPruner(0.3), by(vision.vispruner(0.3))),
    "vispruner, all by difference": (VisPruner(0.5, important=0), by(vision.vispruner(0.5, 0))),
    "visionzip": (VisionZip(5, 3), by(vision.visionzip(5, 3))),
    "visionzip, shares": (VisionZip(0.32, 0.13), by(vision.visionzip(5, 2))),
    "prumerge": (PruMerge(neighbors=4), by(vision.prumerge(neighbors=4))),
    "prumerge, a share": (PruMerge(0.5), by(vision.prumerge(0.5))),
    "prumerge+": (PruMerge(plus=True), by(vision.prumerge(plus=True))),
    "prumerge+, a share": (PruMerge(0.5, plus=True), by(vision.prumerge(0.5, plus=True))),
    "average-pool": (AveragePool(2), by(vision.average_pool(2))),
}


@pytest.mark.parametrize("name", METHODS)
def test_each_method_equals_its_oracle(gqa: Any, name: str) -> None:
    method, oracle = METHODS[name]
    check_pass(gqa, [method], Masks(), FEW, oracle)


@pytest.mark.parametrize("name", ["fastervlm", "visionzip", "prumerge", "average-pool"])
@pytest.mark.parametrize("order", [1, -1])
def test_with_everything_that_works_in_the_decoder(gqa: Any, name: str, order: int) -> None:
    method, oracle = METHODS[name]
    heads = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    heads[2:, 1:3] = False
    neurons = torch.zeros(LAYERS, FFN, dtype=torch.bool)
    neurons[:, : FFN // 2] = True
    masks = Masks(cut_from=3, heads=heads, neurons=neurons, prunes=(Prune(2, 0.6, "fastv"),))
    passes = [method, DropVisualHeads(mask=heads), DropVisualNeurons(0.5), FastV(2, 0.6), CutVisual(3)]
    check_pass(gqa, [*passes[:-1][::order], passes[-1]], masks, FEW[:2], oracle)
    masks = Masks(neighbors=Neighbors((4, 4), 1), prunes=(Prune(1, 0.5, "pyramid", of=1),))
    check_pass(gqa, [method, NeighborAttention(1), PyramidDrop((1,), 0.5)][::order], masks, FEW[1:2], oracle)


def test_several_in_a_row(gqa: Any) -> None:
    def half_by_row(seen: vision.Seen) -> list[vision.Tokens]:
        return vision.fastervlm(0.75)(seen)

    check_pass(gqa, [FasterVLM(0.75), DivPrune(0.5)], Masks(), FEW[:2], by(half_by_row, diverse(0.5)))
    check_pass(gqa, [VisionZip(6, 2), DivPrune(0.5)], Masks(), FEW[:2], by(vision.visionzip(6, 2), diverse(0.5)))


def test_a_second_row_is_that_of_the_tokens_left(gqa: Any) -> None:
    inputs = random_inputs(gqa, seed=5)
    with torch.inference_mode():
        twice = optimize(gqa, [FasterVLM(0.75), FasterVLM(0.5)])(**inputs)
        once = optimize(gqa, [FasterVLM(0.375)])(**inputs)
    assert torch.equal(twice.kept[0], once.kept[0])
    torch.testing.assert_close(twice.logits, once.logits)


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            "visionzip{dominant=5,contextual=3},fastervlm{keep=0.5}",
            "visionzip keeps the CLS token, which fastervlm has",
        ),
        ("visionzip{dominant=12,contextual=4},vispruner{keep=0.5}", "or divprune behind visionzip"),
        ("resize{grid=3},fastervlm{keep=0.7},fastervlm{keep=0.7}", "a resized image was selected from before"),
    ],
)
def test_a_row_has_no_scores_for_what_is_no_patch(gqa: Any, passes: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        optimize(gqa, passes)


def test_the_row_of_a_smaller_image(gqa: Any) -> None:
    inputs = random_inputs(gqa, seed=5)
    with torch.inference_mode():
        whole, half = (optimize(gqa, f"resize{{grid=3}}{more}")(**inputs) for more in ("", ",fastervlm{keep=0.7}"))
    assert set(half.kept[0].flatten().tolist()) < set(whole.kept[0].flatten().tolist())
    assert half.kept[0].shape[1] == 6


def test_a_smaller_image(gqa: Any) -> None:
    """As the tower itself takes smaller images, positions interpolated, but for how the image is made smaller."""
    inputs = random_inputs(gqa, batch=2, images=2)
    with torch.inference_mode():
        out = optimize(gqa, "resize{grid=3}")(**inputs)
        small = torch.nn.functional.interpolate(
            inputs["pixel_values"], size=(24, 24), mode="bilinear", antialias=True, align_corners=False
        )
        tower = gqa.model.vision_tower(small, output_hidden_states=True, interpolate_pos_encoding=True)
        features = tower.hidden_states[gqa.config.vision_feature_layer][:, 1:]
        places = [row * 4 + column for row in (0, 2, 3) for column in (0, 2, 3)]
        tokens = vision.projected(gqa, [vision.Tokens(x, places) for x in features])
        short = vision.shorten(gqa, inputs, tokens)
        with vision.showing(gqa, tokens):
            expected = masked_forward(gqa, short.inputs, Masks()).logits
    assert (out.logits[:, 0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("feature_layer", [-1, -2, -3])
def test_prumerge_asks_the_layer_behind_the_features(feature_layer: int) -> None:
    model = random_llava(layers=2)
    model.config.vision_feature_layer = feature_layer
    inputs = random_inputs(model)
    if feature_layer == -1:  # there is none behind it: the last one is asked
        assert optimize(model, [PruMerge(0.5)])(**inputs).kept[0].shape[1] == 8
    else:
        check_pass(model, [PruMerge(0.5)], Masks(), FEW[:1], by(vision.prumerge(0.5)))


@pytest.mark.parametrize("passes", ["fastervlm{keep=0.5}", "prumerge"])
def test_given_positions_close_the_gaps(gqa: Any, passes: str) -> None:
    inputs = random_inputs(gqa, batch=2, images_per_row=[2, 1], padding="left")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    optimized = optimize(gqa, passes)
    with torch.inference_mode():
        own, given, later = (
            optimized(**inputs, **also).logits
            for also in ({}, {"position_ids": positions}, {"position_ids": positions + 5})
        )
    torch.testing.assert_close(own, given)
    torch.testing.assert_close(own, later, atol=1e-4, rtol=1e-4)  # rotary embeddings know distances only


def test_labels_are_learnt_from_what_is_left(gqa: Any) -> None:
    """The first word behind an image is predicted by the last token that is left of it."""
    inputs = random_inputs(gqa, batch=2, seed=3)
    ids = inputs["input_ids"]
    labels = torch.where(ids == gqa.config.image_token_id, -100, ids)
    labels[:, :2] = -100
    tokens = by(vision.fastervlm(0.5))(gqa, inputs["pixel_values"])
    short = vision.shorten(gqa, inputs, tokens)
    theirs = short.inputs["input_ids"]
    short_labels = torch.where(theirs == gqa.config.image_token_id, -100, theirs)
    short_labels[:, :2] = -100
    with vision.showing(gqa, tokens):
        expected = gqa(**short.inputs, labels=short_labels).loss
    found = optimize(gqa, "fastervlm{keep=0.5}")(**inputs, labels=labels).loss
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["fastervlm", "visionzip", "prumerge", "prumerge+", "average-pool"])
def test_gradients_are_those_of_the_oracle(name: str) -> None:
    """Through what is merged, and for PruMerge through the attention that weighs it."""
    check_gradients(random_llava(layers=2), *METHODS[name])


def test_an_image_left_without_a_token_is_none(mha: Any) -> None:
    inputs = random_inputs(mha, batch=2, images=2)
    with torch.inference_mode():
        out = optimize(mha, [DivPrune(0.01)])(**inputs)
        ids = inputs["input_ids"][inputs["input_ids"] != mha.config.image_token_id].view(2, -1)
        torch.testing.assert_close(out.logits[:, 0], mha(input_ids=ids).logits[:, -1], atol=1e-4, rtol=1e-4)
    assert out.kept[0].shape[1] == 0


def test_prompts_that_end_in_an_image(gqa: Any) -> None:
    ids = random_inputs(gqa)["input_ids"]
    image = gqa.config.image_token_id
    ends = torch.cat([ids[ids != image], ids[ids == image]])[None]
    inputs = {**random_inputs(gqa), "input_ids": ends, "attention_mask": torch.ones_like(ends)}
    tokens = by(vision.fastervlm(0.5))(gqa, inputs["pixel_values"])
    short = vision.shorten(gqa, inputs, tokens)
    with torch.inference_mode(), vision.showing(gqa, tokens):
        expected = gqa(**short.inputs).logits[:, -1:]
    with torch.inference_mode():
        torch.testing.assert_close(
            optimize(gqa, "fastervlm{keep=0.5}")(**inputs).logits, expected, atol=1e-4, rtol=1e-4
        )


BAD = {
    "divprune{keep=1.5}": "above 0, at most 1",
    "fastervlm{keep=0}": "above 0, at most 1",
    "vispruner{important=2}": "0 to 1",
    "visionzip{dominant=17,contextual=0}": "together they are at most 16",
    "visionzip{dominant=0,contextual=3}": "dominant is at least 1",
    "visionzip{dominant=-1}": "a number of tokens",
    "prumerge{keep=0.01}": "leaves an image no token",
    "prumerge{plus=3}": "true or false",
    "prumerge{neighbors=-1}": "0 or more",
    "prumerge,divprune": "put divprune before that",
    "fastervlm,visionzip{dominant=1,contextual=1}": "put visionzip before that",
    "average-pool{factor=3}": "does not divide a grid of 4 x 4",
    "average-pool{factor=0}": "1 or more",
    "resize{grid=9}": "1 to 4",
    "fastervlm,resize{grid=2}": "put resize before that",
}


@pytest.mark.parametrize("passes", BAD)
def test_bad_options_are_refused(mha: Any, passes: str) -> None:
    with pytest.raises(PassError) as error:
        optimize(mha, passes)
    assert BAD[passes] in str(error.value)


@pytest.mark.parametrize("passes", ["fastervlm{keep=1}", "average-pool{factor=1}", "resize{grid=4}"])
def test_what_changes_nothing_says_so(mha: Any, passes: str) -> None:
    with pytest.warns(FoveateWarning, match="changed nothing"):
        assert not optimize(mha, passes).program.shortens


def test_the_forecast_counts_what_is_left(mha: Any) -> None:
    import foveate

    whole, half = (optimize(mha, passes).program for passes in ("", "fastervlm{keep=0.5}"))
    same = foveate.cost(whole, visual_tokens=8, text_tokens=20)
    found = foveate.cost(half, text_tokens=20)
    assert (found.prefill.flops, found.kv_bytes) == (same.prefill.flops, same.kv_bytes)
    open_ended = optimize(mha, "prumerge").program
    assert foveate.cost(open_ended, text_tokens=20, kept_tokens=8).prefill.flops == same.prefill.flops
    assert foveate.cost(open_ended, text_tokens=20).prefill.flops > same.prefill.flops
    with pytest.raises(InputError, match="kept_tokens must be 0 to 16"):
        foveate.cost(open_ended, kept_tokens=17)
    with pytest.raises(InputError, match="there is none"):
        foveate.cost(half, kept_tokens=3)


def test_kept_places_are_those_of_the_patches(mha: Any) -> None:
    inputs = random_inputs(mha, batch=2, images_per_row=[2, 1], padding="left")
    seen = vision.see(mha, inputs["pixel_values"])
    with torch.inference_mode():
        kept = optimize(mha, "visionzip{dominant=4,contextual=2}")(**inputs).kept[0]
    for row, images in ((0, (0, 1)), (1, (2,))):
        whole = (inputs["input_ids"][row] == mha.config.image_token_id).nonzero()[:, 0].tolist()
        expected = []
        for number, image in enumerate(images):
            source = vision.visionzip(4, 2)(seen)[image].source
            expected += [whole[16 * number + place] if place >= 0 else PAD for place in source]
        assert kept[row].tolist() == expected + [PAD] * (12 - len(expected))


@pytest.mark.parametrize(
    ("model", "passes", "reason"),
    [
        *((model, "visionzip", "images stand in one sequence there") for model in (qwen2_vl, qwen2_5_vl, qwen3_vl)),
        *((llava_onevision, passes, "shrinks images and frames") for passes in ("fastervlm", "cls-curve", "divprune")),
    ],
)
def test_towers_of_other_families_are_refused_with_the_reason(
    model: Callable[[], Any], passes: str, reason: str
) -> None:
    with pytest.raises(PassError, match=reason):
        apply_pipeline(trace_program(model()), passes)
