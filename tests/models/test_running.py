"""Every family that runs: its optimized models answer as transformers does, and as the masked oracle."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import foveate
from foveate.errors import InputError, PassError
from foveate.model import OptimizedModel
from foveate.ops import PAD
from tests.ir.programs import once
from tests.models import tiny
from tests.models.prompts import made
from tests.oracle.masked import masked_forward, masked_greedy
from tests.oracle.masks import Masks, Neighbors, Prune

MODELS: dict[str, Any] = {
    "internvl, llama": lambda: tiny.internvl("llama", vision={"image_size": 48}),
    "internvl, qwen2": lambda: tiny.internvl("qwen2", vision={"image_size": 48}),
    "internvl, qwen3": lambda: tiny.internvl("qwen3", vision={"image_size": 48}),
    "internvl, phi3": lambda: tiny.internvl("phi3", vision={"image_size": 48}),
    "llava, qwen2": tiny.llava,
    "qwen2-vl": tiny.qwen2_vl,
    "llava-next, llama": tiny.llava_next,
    "llava-next, mistral": lambda: tiny.llava_next("mistral"),
    "llava-next, qwen2": lambda: tiny.llava_next("qwen2", vision={"image_size": 26}, image_grid_pinpoints=PINPOINTS),
    "llava-onevision, qwen2": tiny.llava_onevision,
    "qwen2.5-vl": tiny.qwen2_5_vl,
    "qwen3-vl": tiny.qwen3_vl,
    "qwen3-vl-moe": tiny.qwen3_vl_moe,
    "smolvlm": tiny.smolvlm,
    "idefics3": lambda: tiny.smolvlm("idefics3", image_size=48),
    "gemma3": tiny.gemma3,
}
PINPOINTS = [[26, 52], [52, 26], [52, 52], [78, 26], [26, 78], [52, 78]]
VIDEOS = ("qwen2-vl", "qwen2.5-vl", "qwen3-vl", "qwen3-vl-moe", "llava-onevision, qwen2")
each = pytest.mark.parametrize("name", MODELS)

ROWS: tuple[list[list[int]], ...] = ([[1]], [[2], [0], [1]], [[0], [0]], [[1], [1]])
"""Images in each prompt."""


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


def prompts(name: str) -> list[list[list[int]]]:
    """Images in each prompt, and behind them videos."""
    return [*ROWS, *([[[1, 1], [0, 2]], [[0, 1]]] if name in VIDEOS else [])]


@pytest.mark.slow
@each
def test_twenty_random_batches_are_answered_as_by_transformers(name: str) -> None:
    model, mine = source(name), optimized(name, "")
    for seed in range(20):
        inputs = made(model, seed, padding="left", text=2 + seed % 5).inputs
        with torch.no_grad():
            expected = masked_forward(model, inputs).logits
            found = mine(**inputs).logits[:, 0]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
            length = inputs["input_ids"].shape[1]
            answer = mine.generate(**inputs, max_new_tokens=6, do_sample=False)[:, length:]
        assert torch.equal(answer, masked_greedy(model, inputs, Masks(), 6)), seed


@each
def test_what_transformers_itself_generates(name: str) -> None:
    """Its own generate, with its own positions and cache."""
    model, mine = source(name), optimized(name, "")
    for rows in prompts(name):
        inputs = made(model, 1, rows).inputs
        theirs = dict(inputs)
        if "image_grid_thw" in inputs or "video_grid_thw" in inputs:
            ids = inputs["input_ids"]
            kinds = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
            theirs["mm_token_type_ids"] = kinds
        options = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(mine.generate(**theirs, **options), model.generate(**theirs, **options))


HEADS = torch.tensor([[True, True, True, True], [True, False, True, True], [False, True, True, False]])
NEURONS = torch.arange(tiny.FFN).expand(tiny.LAYERS, -1) < tiny.FFN // 2

CASES: dict[str, tuple[str, Masks]] = {
    "cut": ("cut-visual{from_layer=1}", Masks(cut_from=1)),
    "neurons": ("drop-visual-neurons{keep=0.5}", Masks(neurons=NEURONS)),
    "fastv": ("fastv{layer=1,keep=0.5}", Masks(prunes=(Prune(1, 0.5, "fastv"),))),
    "random": ("random-prune{layer=1,keep=0.4,seed=3}", Masks(prunes=(Prune(1, 0.4, "given"),))),
    "neighbors": ("neighbor-attention{radius=1}", Masks(neighbors=Neighbors((1, 1), 1))),
    "causal neighbors": (
        "neighbor-attention{radius=1,metric=euclidean,causal=true,see_prefix=false}",
        Masks(neighbors=Neighbors((1, 1), 1, "euclidean", True, False)),
    ),
    "all": (
        "neighbor-attention{radius=1},drop-visual-neurons{keep=0.5},fastv{layer=1,keep=0.5},cut-visual{from_layer=2}",
        Masks(2, None, NEURONS, (Prune(1, 0.5, "fastv"),), Neighbors((1, 1), 1)),
    ),
}


NO_NEIGHBORS = r"neighbor-attention: in layer 0 a token sees every token of its own image, which neighbor-attention"
EXPERTS = "drop-visual-neurons: in layer 0 each token chooses its experts"
REFUSED = {
    **{("gemma3", case): NO_NEIGHBORS for case in ("neighbors", "causal neighbors", "all")},
    **{("qwen3-vl-moe", case): EXPERTS for case in ("neurons", "all")},
}
"""What a family does not take, and why."""


@pytest.mark.slow
@each
@pytest.mark.parametrize(("case", "padding"), [*((case, "left") for case in CASES), ("all", "right")])
def test_every_pass_is_its_masked_oracle(name: str, case: str, padding: str) -> None:
    passes, masks = CASES[case]
    if (name, case) in REFUSED:
        with pytest.raises(PassError, match=REFUSED[name, case]):
            optimized(name, passes)
        return
    check(name, optimized(name, passes), masks, padding)


@pytest.mark.slow
@each
@pytest.mark.parametrize("padding", ["left", "right"])
def test_dropped_heads_are_their_masked_oracle(name: str, padding: str) -> None:
    passes = [foveate.passes.DropVisualHeads(mask=HEADS, from_layer=0)]
    check(name, foveate.optimize(source(name), passes, traced=traced(name)), Masks(heads=HEADS), padding)


def check(name: str, mine: OptimizedModel, masks: Masks, padding: str) -> None:
    from dataclasses import replace

    model = source(name)
    for seed, rows in enumerate(prompts(name)):
        batch = made(model, seed, rows, padding)
        ids = batch.inputs["input_ids"]
        held = masks
        if masks.neighbors is not None:
            held = replace(masks, neighbors=replace(masks.neighbors, coords=batch.coords))
        with torch.no_grad():
            out = mine(**batch.inputs)
            given = [replace(p, given=_chosen(out.kept[p.layer], ids)) for p in held.prunes if p.choose == "given"]
            held = replace(held, prunes=tuple(given)) if given else held
            expected = masked_forward(model, batch.inputs, held)
            torch.testing.assert_close(out.logits[:, 0], expected.logits, rtol=0, atol=1e-4)
            for kept, prune in zip(expected.kept, held.prunes, strict=True):
                assert torch.equal(_chosen(out.kept[prune.layer], ids), kept)
            if padding == "left":
                answer = mine.generate(**batch.inputs, max_new_tokens=4, do_sample=False)[:, ids.shape[1] :]
                assert torch.equal(answer, masked_greedy(model, batch.inputs, held, 4)), rows


def _chosen(order: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(ids.shape[0], ids.shape[1] + 1, dtype=torch.bool)
    mask.scatter_(1, torch.where(order == PAD, ids.shape[1], order), True)
    return mask[:, :-1]


@each
def test_beams_and_several_answers(name: str) -> None:
    """Each copy of a prompt has its own images."""
    model, mine = source(name), optimized(name, "")
    inputs = made(model, 2, [[2], [1]] if name not in VIDEOS else [[2, 1], [1, 2]]).inputs
    torch.manual_seed(0)
    two = mine.generate(**inputs, max_new_tokens=3, do_sample=True, num_return_sequences=2, top_k=1)
    one = mine.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(two, one.repeat_interleave(2, 0))


def test_grids_that_do_not_fit_are_refused() -> None:
    mine = optimized("qwen2-vl", "")
    inputs = made(source("qwen2-vl"), 0, [[1], [1]]).inputs
    grid, pixels = inputs["image_grid_thw"], inputs["pixel_values"]
    for changes, message in (
        ({"image_grid_thw": None}, "pixel_values and image_grid_thw belong together"),
        ({"image_grid_thw": grid[:1]}, r"image_grid_thw .* makes \d+ patches, and pixel_values holds \d+"),
        ({"image_grid_thw": grid[:, :2]}, r"image_grid_thw has shape \(2, 2\)"),
        ({"pixel_values": pixels[:, :5]}, r"pixel_values \(\d+, 5\); this model takes \[images, 3\] and \[patches"),
        ({"image_grid_thw": grid[:1], "pixel_values": pixels[: int(grid[0].prod())]}, "image tokens, and image_grid"),
        ({"image_grid_thw": None, "pixel_values": None}, "image tokens, and image_grid_thw makes 0"),
        ({"attention_mask": inputs["attention_mask"] * (torch.arange(len(inputs["attention_mask"][0])) != 8)}, "fewer"),
        ({"image_sizes": torch.zeros(1)}, "does not take image_sizes; it takes input_ids, pixel_values, image_grid"),
    ):
        with pytest.raises(InputError, match=message):
            mine(**{**inputs, **changes})
