"""Qwen2.5-VL: windows in the tower, times in the positions; `test_running` has what all families must do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import vision_utils

import foveate
from foveate import ops
from foveate.errors import InputError, UnsupportedModelError
from foveate.ir.cost import cost_of
from foveate.ir.program import info
from foveate.models import qwen2_5_vl
from foveate.models.registry import FAMILIES, trace_program
from foveate.passes.pipeline import apply_pipeline
from tests.ir.programs import once
from tests.models import decoders, tiny
from tests.models.decoders import PIPELINES, Prompt
from tests.models.prompts import made
from tests.models.tiny import random, run


@once
def traced() -> tuple[Any, Any, Any]:
    """A model, its joint decoder and its program; nobody may change them."""
    source = tiny.qwen2_5_vl()
    return source, *decoders.traced(source)


def prompt(**sizes: int) -> Prompt:
    """A prompt with an image of 3 x 4 tokens."""
    return decoders.prompt(visual=12, columns=4, leading=(3,), **sizes)


GRIDS = ([[1, 4, 4]], [[1, 2, 6], [1, 8, 4]], [[1, 2, 2], [3, 10, 6], [1, 6, 6]])


def tower_inputs(grids: list[list[int]]) -> dict[str, Tensor]:
    """What comes of images of these grids: time, rows and columns of patches."""
    grid = torch.tensor(grids)
    return {"pixel_values": random(int(grid.prod(1).sum()), 3 * 2 * 8 * 8), "image_grid_thw": grid}


@pytest.mark.parametrize("grids", GRIDS)
def test_windows_are_those_of_transformers(grids: list[list[int]]) -> None:
    program = traced()[2]
    given = tower_inputs(grids)
    order, counts = qwen2_5_vl._windows(program.info, given)
    expected, bounds = vision_utils.get_vision_window_index(given["image_grid_thw"], 2, 32, 8)
    assert torch.equal(order, expected)
    assert torch.equal(counts.cumsum(0) * 4, bounds[1:])
    found = FAMILIES["qwen2_5_vl"].vision_given(program.info, given)
    assert found is not None
    assert torch.equal(found["cu_window_seqlens"], bounds)
    assert torch.equal(found["cu_seqlens"], vision_utils.get_vision_cu_seqlens(given["image_grid_thw"]))


@pytest.mark.parametrize("grids", GRIDS)
def test_the_vision_graph_is_the_transformers_tower_for_any_grid(grids: list[list[int]]) -> None:
    source, _, program = traced()
    given = tower_inputs(grids)
    with torch.no_grad():
        expected = source.model.visual(given["pixel_values"], given["image_grid_thw"]).pooler_output
    inputs = FAMILIES["qwen2_5_vl"].vision_given(program.info, given)
    assert inputs is not None
    out = run(program, program.graphs["vision"], inputs)
    kinds = torch.full((len(expected),), program.info.image_token_id)
    where = FAMILIES["qwen2_5_vl"].layout(program.info, given, kinds, out)
    torch.testing.assert_close(out["out"][where.feature], expected, rtol=1e-5, atol=1e-5)


def test_layers_look_at_windows_or_at_whole_images() -> None:
    _, joint, program = traced()
    found = [str(n.args[3]) for n in program.graphs["vision"].nodes if n.target == ops.varlen_attention]
    assert found == ["cu_window_seqlens", "cu_seqlens", "cu_window_seqlens"]
    assert [info(n).layer for n in joint.nodes if n.target == ops.attention] == list(range(tiny.LAYERS))
    assert "cu_window_seqlens = input(int32, windows + 1)" in program.to_text("vision")
    assert program.info.patches_per_window == 16


def test_the_joint_graph_is_the_transformers_decoder() -> None:
    source, joint, program = traced()
    decoders.check_joint(source, program, joint, prompt())


@pytest.mark.parametrize("prefix", [2, 0, -1])
def test_the_split_prefill_and_a_decode_step_are_the_transformers_decoder(prefix: int) -> None:
    source, _, program = traced()
    decoders.check_split(source, program, prompt(prefix=prefix))


def test_text_form_join_and_meta() -> None:
    source, joint, program = traced()
    decoders.check_forms(program, joint)
    assert trace_program(tiny.qwen2_5_vl("meta")).to_text() == program.to_text()
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
@pytest.mark.parametrize("times", ["none", "whole", "parts"])
def test_positions_are_those_of_transformers(padding: str, times: str) -> None:
    source, _, program = traced()
    if times == "parts" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        pytest.skip("this version of transformers takes whole seconds")
    for seed, rows in enumerate([[[1, 2], [0, 1]], [[0, 3]], [[2, 0], [0, 0], [1, 1]]]):
        inputs = made(source, seed, rows, padding).inputs
        if times == "none":
            inputs.pop("second_per_grid_ts", None)
        elif times == "parts":
            inputs["second_per_grid_ts"] = inputs["second_per_grid_ts"] * 0.37
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        kinds = (ids == program.info.image_token_id).int() + 2 * (ids == program.info.video_token_id).int()
        grids = {n: inputs.get(n) for n in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")}
        expected, _ = source.model.get_rope_index(ids, mm_token_type_ids=kinds, attention_mask=mask, **grids)
        assert torch.equal(FAMILIES["qwen2_5_vl"].positions(program.info, inputs, ids, mask.bool()), expected)


@pytest.mark.parametrize(("seconds", "times"), [(0.6, [0, 1, 2]), (0.75, [0, 1, 3]), (2.0, [0, 4, 8])])
def test_frames_stand_at_their_times(seconds: float, times: list[int]) -> None:
    """Two positions a second, rounded down."""
    program = traced()[2]
    ids = torch.tensor([[5, *[program.info.video_token_id] * 3, 6]])
    given = {"video_grid_thw": torch.tensor([[3, 2, 2]]), "second_per_grid_ts": torch.tensor([seconds])}
    found = FAMILIES["qwen2_5_vl"].positions(program.info, given, ids, torch.ones_like(ids, dtype=torch.bool))
    assert found[:, 0].tolist() == [[0, *(1 + time for time in times), 2], [0, 1, 1, 1, 2], [0, 1, 1, 1, 2]]


def test_what_does_not_fit_is_refused() -> None:
    source = traced()[0]
    mine = foveate.optimize(source, "", traced=traced()[2])
    inputs = made(source, 0, [[1, 1], [0, 1]]).inputs
    seconds = inputs["second_per_grid_ts"]
    for changes, message in (
        ({"second_per_grid_ts": seconds[:1]}, r"second_per_grid_ts has shape \(1,\), and there are 2 videos"),
        ({"second_per_grid_ts": seconds.tolist()}, "second_per_grid_ts is a list; give a tensor"),
        ({"video_grid_thw": None, "pixel_values_videos": None}, "video tokens, and video_grid_thw makes 0"),
        ({"image_grid_thw": None}, "pixel_values and image_grid_thw belong together"),
        ({"image_sizes": torch.zeros(1)}, "does not take image_sizes; it takes .*second_per_grid_ts"),
    ):
        with pytest.raises(InputError, match=message):
            mine(**{**inputs, **changes})


def test_what_cannot_be_traced_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="window_size 8 is less than the pixels of one visual token"):
        trace_program(tiny.qwen2_5_vl("meta", vision={"window_size": 8}))
    with pytest.raises(UnsupportedModelError, match=r"sliding window attention \(16 tokens\) is not supported"):
        text = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
        trace_program(tiny.qwen2_5_vl("meta", text=text))
