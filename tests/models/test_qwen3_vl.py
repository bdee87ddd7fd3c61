"""Qwen3-VL: DeepStack, interleaved positions, frames between words; `test_running` has what all families must do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import vision_utils

import foveate
from foveate import ops
from foveate.errors import InputError, UnsupportedModelError
from foveate.ir.cost import cost_of
from foveate.ir.program import args_of, info
from foveate.models.registry import FAMILIES, trace_program
from foveate.passes.pipeline import apply_pipeline
from tests.ir.programs import once
from tests.models import decoders, tiny
from tests.models.decoders import PIPELINES, Prompt
from tests.models.prompts import made
from tests.models.tiny import random, run
from tests.oracle.masked import masked_forward

aten = torch.ops.aten


@once
def traced() -> tuple[Any, Any, Any]:
    """A model, its joint decoder and its program; nobody may change them."""
    source = tiny.qwen3_vl()
    return source, *decoders.traced(source)


def prompt(**sizes: int) -> Prompt:
    """A prompt with an image of 3 x 4 tokens, and what is added to them behind two layers."""
    made = decoders.prompt(visual=12, columns=4, leading=(3,), **sizes)
    return replace(made, deepstack=random(2, 12, 2, tiny.HIDDEN, seed=1))


GRIDS = ([[1, 4, 4]], [[1, 2, 6], [1, 8, 4]], [[1, 2, 2], [3, 10, 6], [1, 14, 16]])


def tower_inputs(grids: list[list[int]]) -> dict[str, Tensor]:
    """What comes of images of these grids: time, rows and columns of patches."""
    grid = torch.tensor(grids)
    return {"pixel_values": random(int(grid.prod(1).sum()), 3 * 2 * 8 * 8), "image_grid_thw": grid}


@pytest.mark.parametrize("grids", GRIDS)
def test_learned_positions_are_interpolated_as_by_transformers(grids: list[list[int]]) -> None:
    given = tower_inputs(grids)
    found = FAMILIES["qwen3_vl"].vision_given(traced()[2].info, given)
    assert found is not None
    options = {"mode": "bilinear", "align_corners": True, "spatial_merge_size": 2}
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(given["image_grid_thw"], 6, **options)
    assert torch.equal(found["interp_indices"], indices)
    assert torch.equal(found["interp_weights"], weights)


@pytest.mark.parametrize("grids", GRIDS)
def test_the_vision_graph_is_the_transformers_tower_for_any_grid(grids: list[list[int]]) -> None:
    source, _, program = traced()
    given = tower_inputs(grids)
    with torch.no_grad():
        expected = source.model.visual(given["pixel_values"], given["image_grid_thw"])
    inputs = FAMILIES["qwen3_vl"].vision_given(program.info, given)
    assert inputs is not None
    found = run(program, program.graphs["vision"], inputs)
    torch.testing.assert_close(found["out"], expected.pooler_output, rtol=1e-5, atol=1e-5)
    assert found["deepstack"].shape[1] == len(expected.deepstack_features) == 2
    for level, features in zip(found["deepstack"].unbind(1), expected.deepstack_features, strict=True):
        torch.testing.assert_close(level, features, rtol=1e-5, atol=1e-5)


def test_features_are_added_behind_the_first_layers_and_not_in_decode() -> None:
    _, joint, program = traced()
    added = [n for n in joint.nodes if n.target == aten.add.Tensor and info(n).role == "deepstack"]
    assert [info(n).layer for n in added] == [0, 1]
    assert [info(n).layer for n in joint.nodes if n.target == ops.attention] == list(range(tiny.LAYERS))
    for stream in ("visual", "text"):
        assert f"{stream}_deepstack = input(float32, batch, {stream}_tokens, 2, 32)" in program.to_text("prefill")
    assert "text_deepstack" not in program.to_text("decode")
    assert program.info.deepstack == 2


def test_the_joint_graph_is_the_transformers_decoder() -> None:
    source, joint, program = traced()
    decoders.check_joint(source, program, joint, prompt())


@pytest.mark.parametrize("prefix", [2, 0, -1])
def test_the_split_prefill_and_a_decode_step_are_the_transformers_decoder(prefix: int) -> None:
    source, _, program = traced()
    decoders.check_split(source, program, prompt(prefix=prefix))


def test_the_rows_of_positions_and_the_added_features_matter() -> None:
    """The checks above would be worth little if they changed nothing."""
    program, whole = traced()[2], prompt()
    less = replace(whole, deepstack=random(2, 12, 2, tiny.HIDDEN, seed=2))
    same = replace(whole, positions=whole.positions[:1].expand(3, -1, -1))
    logits = [run(program, program.prefill, p.split)["logits"] for p in (whole, less, same)]
    for other in logits[1:]:
        assert not torch.allclose(logits[0], other, atol=1e-3)


@pytest.mark.parametrize("last", ["image", "video"])
def test_a_prompt_that_ends_in_an_image_adds_its_last_features_to_the_text_stream(last: str) -> None:
    source, _, program = traced()
    mine = foveate.optimize(source, "", traced=program)
    inputs = made(source, 3, [[1, 1], [1, 0]] if last == "video" else [[1, 0], [0, 0]], "right").inputs
    token = getattr(program.info, f"{last}_token_id")
    end = int((inputs["input_ids"][0] == token).nonzero()[-1]) + 1
    short = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    short["attention_mask"][0, end:] = 0
    short["input_ids"] = inputs["input_ids"] * short["attention_mask"]
    with torch.no_grad():
        torch.testing.assert_close(mine(**short).logits[:, 0], masked_forward(source, short).logits, rtol=0, atol=1e-4)


def test_kept_tokens_take_their_features_along() -> None:
    """A selection before the second layer gathers what is added behind it, once; one behind both has nothing to do."""
    program = traced()[2]
    early, late = (apply_pipeline(program.copy(), f"fastv{{layer={layer},keep=0.5}}") for layer in (1, 2))
    for graph, taken in ((early.prefill, 1), (late.prefill, 0)):
        gathers = [n for n in graph.nodes if n.target == ops.take_tokens]
        assert sum(args_of(n)[0].name == "visual_deepstack" for n in gathers) == taken


def test_a_tower_without_such_features_has_none() -> None:
    source = tiny.qwen3_vl(vision={"deepstack_visual_indexes": []})
    mine = foveate.optimize(source, "")
    assert mine.program.info.deepstack == 0
    assert "deepstack" not in mine.program.to_text()
    inputs = made(source, 0, [[1, 1], [1, 0]]).inputs
    with torch.no_grad():
        torch.testing.assert_close(
            mine(**inputs).logits[:, 0], masked_forward(source, inputs).logits, rtol=0, atol=1e-4
        )


def test_text_form_join_and_meta() -> None:
    source, joint, program = traced()
    decoders.check_forms(program, joint)
    assert trace_program(tiny.qwen3_vl("meta")).to_text() == program.to_text()
    assert source.config.vision_config._attn_implementation == "sdpa"
    assert not any("forward" in vars(m) for m in source.modules()), "the model is as it was"


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_passes_apply_and_save_prefill_work(pipeline: str) -> None:
    program = traced()[2]
    pruned = apply_pipeline(program.copy(), pipeline)
    dense, less = (cost_of(p, visual_tokens=64, text_tokens=8) for p in (program, pruned))
    assert less.prefill.flops < dense.prefill.flops
    assert less.vision.flops == dense.vision.flops > 0


@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_are_those_of_transformers(padding: str) -> None:
    source, _, program = traced()
    for seed, rows in enumerate([[[1, 2], [0, 1]], [[0, 3]], [[2, 0], [0, 0], [1, 1]]]):
        inputs = made(source, seed, rows, padding).inputs
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        kinds = (ids == program.info.image_token_id).int() + 2 * (ids == program.info.video_token_id).int()
        grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        expected, _ = source.model.get_rope_index(ids, mm_token_type_ids=kinds, attention_mask=mask, **grids)
        assert torch.equal(FAMILIES["qwen3_vl"].positions(program.info, inputs, ids, mask.bool()), expected)


def test_training_in_every_stream() -> None:
    """Labels may follow visual tokens, which then travel with the text, and what is added to them with them."""
    source, _, program = traced()
    mine = foveate.optimize(source, "", traced=program)
    inputs = made(source, 1, [[2, 1], [1, 0]]).inputs
    # Padding predicts nothing, so what follows it has no label.
    labels = torch.where(inputs["attention_mask"].cumsum(1) > 1, inputs["input_ids"], -100)
    loss = mine(**inputs, labels=labels).loss
    kinds = (inputs["input_ids"] == program.info.image_token_id).int()
    kinds += 2 * (inputs["input_ids"] == program.info.video_token_id).int()
    torch.testing.assert_close(loss, source(**inputs, mm_token_type_ids=kinds, labels=labels).loss, rtol=0, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    source = traced()[0]
    mine = foveate.optimize(source, "", traced=traced()[2])
    inputs = made(source, 0, [[1, 1], [0, 1]]).inputs
    for changes, message in (
        ({"video_grid_thw": None, "pixel_values_videos": None}, "video tokens, and video_grid_thw makes 0"),
        ({"image_grid_thw": None}, "pixel_values and image_grid_thw belong together"),
        ({"second_per_grid_ts": torch.ones(2)}, "does not take second_per_grid_ts"),
    ):
        with pytest.raises(InputError, match=message):
            mine(**{**inputs, **changes})


@pytest.mark.parametrize("section", [[1, 1, 2], [0, 2, 2]])
def test_other_shares_of_frequencies_are_refused(section: list[int]) -> None:
    rope = {"rope_type": "default", "mrope_section": section, "rope_theta": 1000.0}
    with pytest.raises(UnsupportedModelError, match=r"mrope_section \[\d, \d, \d\] is not supported for heads of 8"):
        trace_program(tiny.qwen3_vl("meta", text={"rope_parameters": rope}))
