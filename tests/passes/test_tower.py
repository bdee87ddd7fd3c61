"""Methods inside the vision tower: equal to Hugging Face's layers run one by one on what plain lists merge."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

import foveate
import foveate.ir.cost
from foveate.errors import FoveateWarning, InputError, PassError
from foveate.models.random import random_inputs, random_llava
from foveate.passes import CLSCurve, CrossGET, CutVisual, DivPrune, DropVisualHeads, FastV, NeighborAttention, ToMe
from foveate.passes.select.tome import merges
from tests.oracle import tower, vision
from tests.oracle.masked import masked_forward
from tests.oracle.masks import Masks, Neighbors, Prune
from tests.passes.check import Vision, check_gradients, check_pass, optimize
from tests.passes.conftest import HEADS, LAYERS
from tests.passes.test_vision import FEW, diverse


@pytest.fixture(scope="module")
def deep() -> Iterator[Any]:
    """Four tower layers behind an odd grid."""
    yield random_llava(layers=3, heads=4, kv_heads=2, vision_layers=5, visual_tokens=25, seed=2)


METHODS: dict[str, tuple[Any, Vision]] = {
    "tome": (ToMe(3), tower.tokens_by(tower.tome([3] * 4))),
    "tome, as many as go": (ToMe(99), tower.tokens_by(tower.tome([99] * 4))),
    "tome, a share": (ToMe(0.6, proportional=False), tower.tokens_by(tower.tome([3, 4, 4, 4], proportional=False))),
    "tome, fewer and fewer": (
        ToMe(3, schedule="decreasing", sort=False),
        tower.tokens_by(tower.tome([6, 4, 2, 0], sort=False)),
    ),
    "crossget": (CrossGET(3), tower.tokens_by(tower.crossget([3] * 4))),
    "crossget, as many as go": (CrossGET(99), tower.tokens_by(tower.crossget([99] * 4))),
    "crossget, its token too": (CrossGET(0.4, hand_on=True), tower.tokens_by(tower.crossget([2, 3, 2, 3], None, True))),
    "cls-curve": (CLSCurve(layer=2), tower.tokens_by(tower.cls_curve(2))),
    "cls-curve, before the first layer": (CLSCurve(0, 0.3), tower.tokens_by(tower.cls_curve(0, 0.3))),
    "cls-curve, literally": (CLSCurve(3, 0.8, "literal"), tower.tokens_by(tower.cls_curve(3, 0.8, "literal"))),
    "cls-curve, added": (CLSCurve(1, 0.2, "floor_add"), tower.tokens_by(tower.cls_curve(1, 0.2, "floor_add"))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_each_method_equals_its_oracle(deep: Any, name: str) -> None:
    method, oracle = METHODS[name]
    check_pass(deep, [method], Masks(), FEW, oracle)


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", ["tome", "crossget", "cls-curve"])
def test_with_what_works_in_the_decoder(gqa: Any, name: str, order: int) -> None:
    method, oracle = {
        "tome": (ToMe(2), tower.tokens_by(tower.tome([2, 2]))),
        "crossget": (CrossGET(2), tower.tokens_by(tower.crossget([2, 2]))),
        "cls-curve": (CLSCurve(1, 0.5), tower.tokens_by(tower.cls_curve(1, 0.5))),
    }[name]
    heads = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    heads[2:, 1:3] = False
    masks = Masks(cut_from=3, heads=heads, prunes=(Prune(2, 0.6, "fastv"),))
    passes = [method, DropVisualHeads(mask=heads), FastV(2, 0.6)]
    check_pass(gqa, [*passes[::order], CutVisual(3)], masks, FEW[:2], oracle)
    masks = Masks(neighbors=Neighbors((4, 4), 1))
    check_pass(gqa, [method, NeighborAttention(1)][::order], masks, FEW[1:2], oracle)


def test_selections_that_ask_for_no_attention_go_behind(deep: Any) -> None:
    def half(model: Any, pixels: torch.Tensor) -> list[vision.Tokens]:
        return diverse(0.5)(model, METHODS["tome"][1](model, pixels))

    check_pass(deep, [ToMe(3), DivPrune(0.5)], Masks(), FEW[:2], half)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_are_those_of_the_oracle(deep: Any, name: str) -> None:
    check_gradients(deep, *METHODS[name])


def vectors_in(path: Path, layers: int = 4) -> torch.Tensor:
    vectors = torch.randn(1, layers, 32, generator=torch.Generator().manual_seed(1))
    save_file({"cross_image": vectors}, path)
    return vectors[0]


def test_crossget_with_learned_vectors(deep: Any, tmp_path: Path) -> None:
    vectors = vectors_in(tmp_path / "vectors.safetensors", layers=5)
    method = CrossGET(3, vectors=str(tmp_path / "vectors.safetensors"))
    oracle = tower.tokens_by(tower.crossget([3] * 4, vectors))
    optimized = check_pass(deep, [method], Masks(), FEW[:2], oracle)
    assert "foveate.crossget.vectors" in optimized.program.used_weights()
    optimized.save_pretrained(tmp_path / "saved")
    inputs = random_inputs(deep)
    with torch.inference_mode():
        assert torch.equal(foveate.load(tmp_path / "saved")(**inputs).logits, optimized(**inputs).logits)


def test_a_file_of_vectors_that_does_not_fit(deep: Any, tmp_path: Path) -> None:
    path = tmp_path / "vectors.safetensors"
    for made, message in (
        (3, r"\[4 or more, 32\]; it holds \[1, 3, 32\]"),
        (0, "cannot be read"),
        (-1, "cannot be read"),
    ):
        if made > 0:
            vectors_in(path, made)
        elif made == 0:
            path.write_bytes(b"no tensors")
        else:
            path.unlink()
        with pytest.raises(PassError, match=message):
            optimize(deep, [CrossGET(3, vectors=str(path))])


def test_prompts_that_end_in_an_image(deep: Any) -> None:
    inputs = random_inputs(deep)
    ids, image = inputs["input_ids"], deep.config.image_token_id
    ends = torch.cat([ids[ids != image], ids[ids == image]])[None]
    inputs = {**inputs, "input_ids": ends, "attention_mask": torch.ones_like(ends)}
    tokens = METHODS["tome"][1](deep, inputs["pixel_values"])
    short = vision.shorten(deep, inputs, tokens)
    with torch.inference_mode(), vision.showing(deep, tokens):
        expected = masked_forward(deep, short.inputs, Masks()).logits
        found = optimize(deep, [ToMe(3)])(**inputs).logits[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("pipeline", ["tome{merge=3}", "crossget{merge=3}", "cls-curve{layer=2}"])
def test_a_saved_program_does_the_same(deep: Any, pipeline: str, tmp_path: Path) -> None:
    optimized = optimize(deep, pipeline)
    inputs = random_inputs(deep, batch=2, images_per_row=[2, 1], padding="left")
    optimized.save_pretrained(tmp_path / "saved")
    again = foveate.load(tmp_path / "saved")
    with torch.inference_mode():
        a, b = optimized(**inputs), again(**inputs)
    assert torch.equal(a.logits, b.logits) and torch.equal(a.kept[0], b.kept[0])


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["tome{merge=3}", "crossget{merge=3}", "cls-curve{layer=2,alpha=1}"])
def test_in_bfloat16(pipeline: str) -> None:
    models = [random_llava(layers=2, vision_layers=5, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)]
    with torch.inference_mode():
        exact, half = (optimize(model, pipeline)(**random_inputs(model)) for model in models)
    assert half.logits.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(half.logits.float(), exact.logits, dim=-1).min() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("pipeline", ["tome{merge=3}", "crossget{merge=3}", "cls-curve{layer=2}"])
def test_compiled_layers_do_the_same(deep: Any, pipeline: str) -> None:
    inputs = random_inputs(deep, batch=2)
    eager = optimize(deep, pipeline)
    compiled = foveate.optimize(deep, pipeline, backend="inductor")
    with torch.inference_mode():
        torch.testing.assert_close(compiled(**inputs).logits, eager(**inputs).logits, atol=1e-4, rtol=1e-4)


def test_the_forecast_counts_what_is_left_in_each_layer(deep: Any) -> None:
    program = optimize(deep, [ToMe(3)]).program
    width, ffn, patch = 32, 128, 3 * 8 * 8
    flops = 2 * 25 * patch * width
    for number in range(4):
        n = 26 - 3 * number
        flops += 2 * n * 4 * width * width + 4 * n * n * width + 2 * (n // 2) * (n - n // 2) * 16
        flops += 2 * (n - 3) * 2 * width * ffn
    flops += 2 * 13 * (width * 64 + 64 * 64)
    assert foveate.cost(program).vision.flops == flops


def test_the_forecast_of_a_curve_is_that_of_the_tokens_left(deep: Any) -> None:
    program = optimize(deep, "cls-curve{layer=2}").program
    width, ffn, patch = 32, 128, 3 * 8 * 8

    def layer(n: int) -> int:
        return 2 * n * (4 * width * width + 2 * width * ffn) + 4 * n * n * width

    for kept in (0, 7, 25):
        flops = 2 * 25 * patch * width + 2 * layer(26) + 2 * 25 * width
        flops += 2 * layer(1 + kept) + 2 * kept * (width * 64 + 64 * 64)
        spent = foveate.cost(program, kept_tokens=kept)
        assert spent.vision.flops == flops
        parts = foveate.ir.cost.breakdown(program, kept_tokens=kept)["vision"]
        assert sum(part.work.flops for part in parts) == flops
        assert [part.layer for part in parts] == [-1, 0, 1, 2, 3, 4]
    assert spent.peak_bytes >= foveate.cost(program, kept_tokens=7).peak_bytes
    with pytest.raises(InputError, match="kept_tokens must be 0 to 25"):
        foveate.cost(program, kept_tokens=26)
    conventions = [foveate.cost(optimize(deep, p).program, convention="lvpruning") for p in ("", "cls-curve{layer=2}")]
    assert conventions[0].vision.flops == conventions[1].vision.flops  # where every token is kept


def test_torch_counts_a_running_model_as_the_forecast_does(deep: Any) -> None:
    optimized = optimize(deep, "cls-curve{layer=2}")
    inputs = random_inputs(deep, text_tokens=10, prefix=3)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        kept = optimized(**inputs).kept[0].shape[1]
    spent = foveate.cost(optimized.program, text_tokens=10, prefix_tokens=3, kept_tokens=kept)
    assert counter.get_total_flops() == spent.first_token_flops


def test_two_graphs_of_a_tower_stand_in_diffs(deep: Any) -> None:
    dense, cut = (optimize(deep, pipeline).program for pipeline in ("", "cls-curve{layer=2}"))
    assert not foveate.diff(cut, cut).changed
    found = foveate.diff(dense, cut)
    assert found.to_json()["graphs"]["vision_rest"]["changed"]
    assert all("vision_rest" in text for text in (found.to_text(), found.to_markdown(), found.to_html()))


def test_the_towers_second_graph_runs_on_the_largest_count(deep: Any) -> None:
    inputs = random_inputs(deep, batch=3)
    optimized = optimize(deep, "cls-curve{layer=2}")
    counts = [len(t.source) for t in METHODS["cls-curve"][1](deep, inputs["pixel_values"])]
    assert len(set(counts)) > 1
    widths: list[int] = []
    run = optimized._run["vision_rest"]
    optimized._run["vision_rest"] = lambda given: widths.append(given["places"].shape[1]) or run(given)
    with torch.inference_mode():
        together = optimized(**inputs).logits
        alone = [optimized(**{n: x[i : i + 1] for n, x in inputs.items()}).logits for i in range(3)]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=1e-5)
    assert widths == [max(counts), *counts]


def test_a_batch_without_an_image(deep: Any) -> None:
    inputs = random_inputs(deep, images=0)
    none = random_inputs(deep)["pixel_values"][:0]
    for pipeline in ("tome{merge=3}", "crossget{merge=3}", "cls-curve{layer=2}"):
        with torch.inference_mode():
            found = optimize(deep, pipeline)(**inputs, pixel_values=none).logits[:, 0]
            torch.testing.assert_close(found, deep(**inputs).logits[:, -1], atol=1e-4, rtol=1e-4)


def test_one_patch_is_kept_whatever_the_curve() -> None:
    model = random_llava(layers=2, visual_tokens=1)
    inputs = random_inputs(model)
    with torch.inference_mode():
        found = optimize(model, "cls-curve{layer=1,alpha_mode=literal}")(**inputs).logits[:, 0]
        torch.testing.assert_close(found, model(**inputs).logits[:, -1], atol=1e-4, rtol=1e-4)


def test_schedules() -> None:
    assert merges(16, 576, 23) == [16] * 23
    falling = merges(16, 576, 23, "decreasing")
    assert (sum(falling), falling[0], falling[-1]) == (23 * 16, 32, 0)
    assert all(a >= b - 1 for a, b in itertools.pairwise(falling))
    assert merges(0.1, 100, 4) == [2, 3, 2, 3]
    assert merges(5, 100, 1, "decreasing") == [5]
    assert merges(9, 16, 4) == [8, 4, 2, 1] and merges(3, 1, 2) == [0, 0]


BAD = {
    "tome{merge=-1}": "0 or more",
    "tome{merge=1.5}": "between 0 and 1",
    "tome{schedule=falling}": "constant or decreasing",
    "tome{proportional=1}": "true or false",
    "tome{sort=2}": "true or false",
    "fastervlm,tome": "put tome before that",
    "prumerge,tome": "put tome before that",
    "tome,tome": "use one of the two",
    "tome,visionzip": "use one of the two",
    "tome,resize{grid=2}": "use one of the two",
    "crossget{merge=-2}": "0 or more",
    "crossget{vectors=3}": "the path of a safetensors file",
    "crossget{hand_on=1}": "true or false",
    "crossget,tome": "use one of the two",
    "crossget,fastervlm": "behind the attention that fastervlm looks at",
    "divprune,crossget": "put crossget before that",
    "cls-curve{layer=4}": "0 to 3, of the layers behind the features",
    "cls-curve{layer=-1}": "0 or more",
    "cls-curve{layer=1,alpha=2}": "0 to 1",
    "cls-curve{layer=1,alpha_mode=most}": "expand, literal, floor_add",
    "cls-curve{layer=1},tome": "use one of the two",
    "cls-curve{layer=1},divprune": "use one of the two",
    "tome,cls-curve{layer=1}": "use one of the two",
    "divprune,cls-curve{layer=1}": "put cls-curve before that",
    "tome,fastervlm": "behind the attention that fastervlm looks at",
    "tome,vispruner": "behind the attention that vispruner looks at",
}


@pytest.mark.parametrize("pipeline", BAD)
def test_what_does_not_fit_is_refused(deep: Any, pipeline: str) -> None:
    with pytest.raises(PassError) as error:
        optimize(deep, pipeline)
    assert BAD[pipeline] in str(error.value)


def test_what_changes_nothing_says_so(deep: Any) -> None:
    for pipeline in ("tome{merge=0}", "tome{merge=0.01}", "crossget{merge=0}"):
        with pytest.warns(FoveateWarning, match="changed nothing"):
            assert not optimize(deep, pipeline).program.shortens


@pytest.mark.slow
@pytest.mark.parametrize(("layer", "why"), [(0, "no layer of the tower"), ([-2, -3], "several layers")])
def test_features_that_are_not_one_layers_are_refused(layer: Any, why: str) -> None:
    model = random_llava(layers=2)
    if isinstance(layer, list):
        model.model.multi_modal_projector.linear_1 = torch.nn.Linear(64, 64)
    model.config.vision_feature_layer = layer
    with pytest.raises(PassError, match=why):
        foveate.optimize(model, "tome{merge=1}")
