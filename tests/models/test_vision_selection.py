"""Selections in other towers than LLaVA's: equal to transformers on tokens that lists choose."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.errors import PassError
from foveate.model import OptimizedModel
from tests.ir.programs import once
from tests.ir.test_cost import COUNTED
from tests.models import tiny
from tests.models.prompts import made
from tests.oracle import squares, vision
from tests.oracle.anyres import tiles_of
from tests.oracle.masked import masked_forward, masked_greedy
from tests.oracle.masks import Masks, Prune
from tests.oracle.vision import Tokens, divprune, shorten

MODELS: dict[str, Any] = {
    "internvl": lambda: tiny.internvl("qwen2", vision={"image_size": 64}),
    "smolvlm": lambda: tiny.smolvlm(image_size=64),
    "idefics3": lambda: tiny.smolvlm("idefics3", image_size=64),
    "gemma3": tiny.gemma3,
    "llava": tiny.llava,
}
ROWS = ([[1]], [[2], [0], [1]], [[0], [0]])
"""Images in each prompt."""

Oracle = Callable[[squares.Squares], list[Tokens]]

METHODS: dict[str, tuple[str, Oracle]] = {
    "fastervlm": ("fastervlm{keep=0.5}", lambda seen: squares.fastervlm(seen, 0.5)),
    "vispruner": ("vispruner{keep=0.5}", lambda seen: squares.vispruner(seen, 0.5)),
    "visionzip": ("visionzip{dominant=3,contextual=2}", lambda seen: squares.visionzip(seen, 3, 2)),
    "prumerge": ("prumerge", squares.prumerge),
    "prumerge, a share": ("prumerge{keep=0.5}", lambda seen: squares.prumerge(seen, 0.5)),
    "everything": ("divprune{keep=0.4}", squares.everything),
}


@once
def source(name: str) -> Any:
    return MODELS[name]()


@once
def traced(name: str) -> Any:
    return foveate.trace(source(name))


def optimized(name: str, passes: str) -> OptimizedModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return foveate.optimize(source(name), passes, traced=traced(name))


def check(name: str, passes: str, oracle: Oracle, masks: Masks, padding: str = "left") -> None:
    model, mine = source(name), optimized(name, passes)
    for seed, rows in enumerate(ROWS):
        inputs = made(model, seed, rows, padding).inputs
        with torch.no_grad():
            tokens = []
            if "pixel_values" in inputs:
                pixels = inputs["pixel_values"]
                if pixels.dim() == 5:
                    pixels = pixels[pixels.flatten(2).any(2)]
                tokens = squares.projected(model, oracle(squares.see(model, pixels)))
                if passes.startswith("divprune"):
                    tokens = divprune(model, tokens, 0.4)
            short = shorten(model, inputs, tokens, mine.program.info.tokens_per_image).inputs
            short.pop("pixel_values", None)
            if name == "gemma3":
                short["token_type_ids"] = (short["input_ids"] == model.config.image_token_id).long()
            with squares.showing(model, short, tokens) as given:
                expected = masked_forward(model, given, masks)
                found = mine(**inputs)
                torch.testing.assert_close(found.logits[:, 0], expected.logits, rtol=0, atol=1e-4)
                length = inputs["input_ids"].shape[1]
                if padding == "left":
                    answer = mine.generate(**inputs, max_new_tokens=4, do_sample=False)[:, length:]
                    assert torch.equal(answer, masked_greedy(model, given, masks, 4)), rows


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_each_method_equals_its_oracle(name: str, method: str) -> None:
    check(name, *METHODS[method], Masks())


@pytest.mark.parametrize("name", MODELS)
def test_means_of_squares(name: str) -> None:
    factor = 3 if name == "gemma3" else 2
    check(name, f"average-pool{{factor={factor}}}", lambda seen: squares.average_pool(seen, factor), Masks())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_with_what_works_in_the_decoder(name: str, padding: str) -> None:
    neurons = torch.arange(tiny.FFN).expand(tiny.LAYERS, -1) < tiny.FFN // 2
    masks = Masks(2, None, neurons, (Prune(1, 0.6, "fastv"),))
    passes = "fastv{layer=1,keep=0.6},fastervlm{keep=0.6},drop-visual-neurons{keep=0.5},cut-visual{from_layer=2}"
    check(name, passes, lambda seen: squares.fastervlm(seen, 0.6), masks, padding)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_work_is_what_torch_counts(name: str, method: str) -> None:
    program = optimized(name, METHODS[method][0]).program
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        fx.GraphModule(program.weights, program.graphs["vision"])(torch.zeros(3, *program.info.image_size))
    assert counter.get_total_flops() == foveate.cost(program, batch=3).vision.flops


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("tome{merge=1}", r"tome: in the tower of internvl a token is 2 x 2 patches, and tome works on single ones"),
        ("crossget{merge=1}", "crossget: in the tower of internvl a token is 2 x 2 patches"),
        ("cls-curve{layer=0}", "cls-curve: in the tower of internvl a token is 2 x 2 patches"),
        ("resize{grid=2}", "resize: in the tower of internvl a token is 2 x 2 patches"),
        ("cdpruner{clip=/nowhere}", "cdpruner: clip must be none: the tower of internvl is not that of a CLIP"),
        ("average-pool{factor=3}", "factor=3 does not divide a grid of 4 x 4"),
        ("visionzip{dominant=16,contextual=1}", "do not fit an image of 16 tokens"),
        ("fastervlm{keep=0.5},visionzip{dominant=2,contextual=1}", "put visionzip before that"),
    ],
)
def test_what_does_not_fit_is_refused(passes: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        optimized("internvl", passes)


NEXT: dict[str, tuple[str, Oracle]] = {
    "fastervlm": ("fastervlm{keep=0.5}", lambda seen: vision.fastervlm(0.5)(seen)),
    "vispruner": ("vispruner{keep=0.5}", lambda seen: vision.vispruner(0.5)(seen)),
    "divprune": ("divprune{keep=0.4}", lambda seen: divprune(seen.model, _whole(seen), 0.4)),
    "both": ("fastervlm{keep=0.7},divprune{keep=0.7}", lambda seen: _both(seen)),
}


def _whole(seen: vision.Seen) -> list[Tokens]:
    return vision.projected(seen.model, [Tokens(x[1:], list(range(len(x) - 1))) for x in seen.features])


def _both(seen: vision.Seen) -> list[Tokens]:
    return divprune(seen.model, vision.projected(seen.model, vision.fastervlm(0.7)(seen)), 0.7)


@once
def next_source() -> Any:
    return tiny.llava_next()


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("method", NEXT)
def test_tiles_side_by_side_keep_their_tokens_where_they_are(method: str, padding: str) -> None:
    passes, oracle = NEXT[method]
    model = next_source()
    mine = foveate.optimize(model, passes)
    for seed, rows in enumerate(ROWS):
        batch = made(model, seed, rows, padding)
        inputs = batch.inputs
        ids, gone = inputs["input_ids"], torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        with torch.no_grad():
            features: list[Tokens] = []
            if "pixel_values" in inputs:
                pixels, sizes = inputs["pixel_values"], inputs["image_sizes"]
                if pixels.dim() == 5:
                    pixels = torch.cat([x[: tiles_of(model, size)] for x, size in zip(pixels, sizes.tolist())])
                kept = [x.source for x in oracle(vision.see(model, pixels))]
                for place, (tile, row, column) in zip(
                    (batch.coords[..., 0] >= 0).nonzero(), batch.coords[batch.coords[..., 0] >= 0].tolist(), strict=True
                ):
                    gone[tuple(place)] = row * mine.program.info.grid[1] + column not in kept[tile]
                whole = torch.cat(model.model.get_image_features(inputs["pixel_values"], sizes).pooler_output)
                features = [Tokens(whole[~gone[ids == model.config.image_token_id]], [])]
            left = [row[stays] for row, stays in zip(ids, inputs["attention_mask"].bool() & ~gone, strict=True)]
            width = max(map(len, left))
            short = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in left])
            given = {"input_ids": short, "attention_mask": (short != 0).long()}
            with squares.showing(model, given, features) as given:
                expected = masked_forward(model, given)
                found = mine(**inputs)
                torch.testing.assert_close(found.logits[:, 0], expected.logits, rtol=0, atol=1e-4)
                if padding == "left":
                    answer = mine.generate(**inputs, max_new_tokens=4, do_sample=False)[:, ids.shape[1] :]
                    assert torch.equal(answer, masked_greedy(model, given, Masks(), 4)), rows


@pytest.mark.parametrize("passes", ["visionzip{dominant=2,contextual=1}", "prumerge", "average-pool{factor=3}", "tome"])
def test_what_makes_other_tokens_has_no_place_for_them_there(passes: str) -> None:
    with pytest.raises(PassError, match="in a llava_next rows of several tiles stand side by side, with newlines"):
        foveate.optimize(next_source(), passes)
