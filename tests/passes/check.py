"""`check_pass`: the one way in which every pass is tested against the masked oracle."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

import foveate
from foveate.errors import FoveateWarning
from foveate.ir.program import Program
from foveate.ir.rules import verify
from foveate.ir.split import structure
from foveate.ir.text import parse_graphs
from foveate.model import OptimizedModel
from foveate.models.random import random_inputs
from foveate.ops import PAD
from foveate.passes import Pass, parse_pipeline, pipeline_text
from tests.oracle.masked import masked_forward, masked_greedy
from tests.oracle.masks import Masks
from tests.oracle.vision import Tokens, shorten, showing

TOLERANCE = 1e-4

PROMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"batch": 2, "prefix": 0},
    {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"},
    {"batch": 3, "padding": "right"},
    {"batch": 2, "images": 3, "text_tokens": 17},
    {"batch": 2, "images": 0},
    {"batch": 1, "text_tokens": 4},
)
"""Prompts every pass must get right: ragged, padded on both sides, several images, none."""


_TRACED: dict[int, tuple[Any, Program]] = {}


def traced(model: Any) -> Program:
    """`foveate.trace`, once for each model: on a tiny one it takes longer than all that follows."""
    if id(model) not in _TRACED:
        _TRACED[id(model)] = (model, foveate.trace(model))
    return _TRACED[id(model)][1]


def optimize(model: Any, passes: Any, calibration: Any = None) -> OptimizedModel:
    """`foveate.optimize` of what `traced` gives."""
    return foveate.optimize(model, passes, calibration, traced=traced(model))


Vision = Callable[[Any, torch.Tensor], list[Tokens]]
"""What a model and pixels become by the passes that work in the vision tower: each image's projected tokens."""


def check_pass(
    model: Any,
    passes: Sequence[Pass],
    masks: Masks,
    prompts: Sequence[dict[str, Any]] = PROMPTS,
    vision: Vision | None = None,
) -> OptimizedModel:
    """Optimize and hold the result against the HF model run with explicit masks, on the tokens that `vision` gives.

    Checks that the pipeline prints and parses, the program verifies and survives its text form, logits equal the
    oracle's within 1e-4, the kept tokens are the oracle's, decoding equals rerunning the longer prompt with choices
    held, applying the passes to a fresh trace gives the same graphs, and the model itself is left as it was.
    """
    assert parse_pipeline(pipeline_text(passes)) == list(passes)
    before = _dense(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FoveateWarning)
        optimized = optimize(model, passes)
    program = optimized.program
    verify(program)
    again = optimize(model, passes).program
    for name, graph in program.graphs.items():
        assert structure(graph) == structure(again.graphs[name]), f"{name} differs between two runs"
        if name != "decode":
            assert structure(parse_graphs(program, program.to_text(name))[name]) == structure(graph)
    for number, prompt in enumerate(prompts):
        _check_prompt(model, optimized, masks, random_inputs(model, seed=number, **prompt), prompt, vision)
    assert torch.equal(before, _dense(model)), "the model that was passed in has changed"
    return optimized


def check_gradients(model: Any, method: Pass, oracle: Vision) -> None:
    """Hold gradients of every weight against those of the HF model on the tokens that `oracle` gives."""
    inputs = random_inputs(model, batch=2, seed=3)
    labels = torch.where(inputs["input_ids"] == model.config.image_token_id, -100, inputs["input_ids"])
    tokens = oracle(model, inputs["pixel_values"])
    short = shorten(model, inputs, tokens)
    theirs = short.inputs["input_ids"]
    with showing(model, tokens):
        attended = short.inputs["attention_mask"].bool()
        wanted = torch.where((theirs == model.config.image_token_id) | ~attended, -100, theirs)
        # The first token of a row follows none, also where padding stands before it.
        wanted.scatter_(1, attended.int().argmax(1, keepdim=True), -100)
        model(**short.inputs, labels=wanted).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        optimize(model, [method])(**inputs, labels=labels).loss.backward()
    for path, gradient in expected.items():
        found = dict(model.named_parameters())[path].grad
        found = torch.zeros_like(gradient) if found is None else found
        torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-3, msg=path)
    model.zero_grad()


def _dense(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(**random_inputs(model, seed=99)).logits
    assert isinstance(logits, torch.Tensor)
    return logits


def _check_prompt(
    model: Any, optimized: OptimizedModel, masks: Masks, inputs: Any, prompt: Any, vision: Vision | None
) -> None:
    with torch.inference_mode(), ExitStack() as stack:
        out = optimized(**inputs)
        given, places = inputs, None
        if vision is not None and "pixel_values" in inputs:
            tokens = vision(model, inputs["pixel_values"])
            stack.enter_context(showing(model, tokens))
            given, places = (short := shorten(model, inputs, tokens)).inputs, short.places
            masks = _with_coords(model, masks, inputs, places)
        masks = _with_given(masks, out, inputs, places)
        expected = masked_forward(model, given, masks)
        assert out.logits.shape == (len(inputs["input_ids"]), 1, expected.logits.shape[-1])
        error = (out.logits[:, 0] - expected.logits).abs().max().item()
        assert error < TOLERANCE, f"{prompt}: logits differ from the oracle by {error:.1e}"
        for choice, prune in zip(expected.kept, masks.prunes, strict=True):
            assert torch.equal(_chosen(out.kept[prune.layer], inputs, places), choice & _placed(choice, places)), prompt
        if prompt.get("padding") != "right":
            length = inputs["input_ids"].shape[1]
            tokens = optimized.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)[:, length:]
            assert torch.equal(tokens, masked_greedy(model, given, masks, 4)), f"{prompt}: decoding is not prefill"


def _with_given(masks: Masks, out: Any, inputs: Any, places: Any) -> Masks:
    """Random choices are taken from the program; everything else about them is still the oracle's to say."""
    prunes = []
    for prune in masks.prunes:
        given = prune.given
        if prune.choose == "given" and given is None:
            given = _chosen(out.kept[prune.layer], inputs, places)
        prunes.append(replace(prune, given=given))
    return replace(masks, prunes=tuple(prunes))


def _with_coords(model: Any, masks: Masks, inputs: Any, places: list[list[int | None]]) -> Masks:
    """Where the visual tokens of a shortened prompt stand in their images; CLS is far from everything."""
    if masks.neighbors is None:
        return masks
    height, width = masks.neighbors.grid
    found = torch.full((len(places), len(places[0]), 3), -1000)
    for row, ids in enumerate(inputs["input_ids"]):
        numbers = {place: n for n, place in enumerate((ids == model.config.image_token_id).nonzero()[:, 0].tolist())}
        for column, place in enumerate(places[row]):
            found[row, column, 0] = -1000 - column
            if place in numbers:
                image, within = divmod(numbers[place], height * width)
                found[row, column] = torch.tensor([image, within // width, within % width])
    return replace(masks, neighbors=replace(masks.neighbors, coords=found))


def _chosen(order: torch.Tensor, inputs: Any, places: list[list[int | None]] | None) -> torch.Tensor:
    """Places in the prompt, or in the shortened prompt, as a mask."""
    whole = _kept_mask(order, inputs["input_ids"])
    if places is None:
        return whole
    return torch.tensor([[p is not None and bool(mask[p]) for p in row] for mask, row in zip(whole, places)])


def _placed(choice: torch.Tensor, places: list[list[int | None]] | None) -> torch.Tensor:
    """The tokens that have a place in the prompt: all but CLS."""
    return torch.ones_like(choice) if places is None else torch.tensor([[p is not None for p in r] for r in places])


def _kept_mask(order: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(ids.shape[0], ids.shape[1] + 1, dtype=torch.bool)
    mask.scatter_(1, torch.where(order == PAD, ids.shape[1], order), True)
    return mask[:, :-1]
