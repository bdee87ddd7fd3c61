"""Qwen2-VL: the traced graphs are the model, for every grid and with positions of three rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import vision_utils

from foveate import ops
from foveate.errors import UnsupportedModelError
from foveate.ir.cost import cost_of
from foveate.ir.program import info
from foveate.models.registry import trace_program
from foveate.passes.pipeline import apply_pipeline
from tests.ir.programs import once
from tests.models import decoders
from tests.models.decoders import PIPELINES, Prompt
from tests.models.tiny import HEADS, KV_HEADS, LAYERS, internvl, qwen2_vl, random, run


@once
def traced() -> tuple[Any, Any, Any]:
    """A model, its joint decoder and its program; nobody may change them."""
    source = qwen2_vl()
    return source, *decoders.traced(source)


@once
def plain() -> Any:
    """The program of an InternVL whose Qwen2 decoder has the same weights."""
    source = traced()[0]
    made = internvl("qwen2", rope_theta=1000.0, rms_norm_eps=source.config.text_config.rms_norm_eps)
    made.model.language_model.load_state_dict(source.model.language_model.state_dict())
    made.lm_head.load_state_dict(source.lm_head.state_dict())
    return decoders.traced(made)[1]


def prompt(rows: int = 3, **sizes: int) -> Prompt:
    """A prompt with an image of 3 x 4 tokens whose positions are those of M-RoPE (all rows equal for rows=1)."""
    return decoders.prompt(visual=12, columns=4 if rows == 3 else None, leading=(3,), **sizes)


def test_every_decoder_layer_has_one_attention_node() -> None:
    _, joint, _ = traced()
    found = [n for n in joint.nodes if n.target == ops.attention]
    assert [info(n).layer for n in found] == list(range(LAYERS))
    assert {n.args[0][0].meta["val"].shape[1] for n in found} == {HEADS}
    assert {n.args[1][0].meta["val"].shape[1] for n in found} == {KV_HEADS}


def test_the_joint_graph_is_the_transformers_decoder() -> None:
    source, joint, program = traced()
    decoders.check_joint(source, program, joint, prompt())


@pytest.mark.parametrize("prefix", [2, 0, -1])
def test_the_split_prefill_and_a_decode_step_are_the_transformers_decoder(prefix: int) -> None:
    source, _, program = traced()
    decoders.check_split(source, program, prompt(prefix=prefix))


def test_the_rows_of_positions_matter() -> None:
    """The checks above would be worth little if the prompt's three rows were the same."""
    _, _, program = traced()
    mixed = prompt()
    same = prompt(rows=1)
    logits = [run(program, program.prefill, p.split)["logits"] for p in (mixed, same)]
    assert not torch.allclose(*logits, atol=1e-3)


def tower_inputs(source: Any, grids: list[list[int]]) -> dict[str, Tensor]:
    """What the vision graph takes for random images of these grids (time, rows, columns of patches)."""
    grid = torch.tensor(grids)
    count = int(grid.prod(1).sum())
    return {
        "pixel_values": random(count, 3 * 2 * 8 * 8),
        "patch_positions": vision_utils.get_vision_position_ids(grid, source.config.vision_config.spatial_merge_size),
        "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid),
    }


@pytest.mark.parametrize("grids", [[[1, 4, 4]], [[1, 2, 6], [1, 8, 4]], [[1, 2, 2], [1, 10, 2], [1, 4, 6], [1, 2, 2]]])
def test_the_vision_graph_is_the_transformers_tower_for_any_grid(grids: list[list[int]]) -> None:
    source, _, program = traced()
    inputs = tower_inputs(source, grids)
    with torch.no_grad():
        expected = source.model.visual(inputs["pixel_values"], torch.tensor(grids)).pooler_output
    actual = run(program, program.graphs["vision"], inputs)["out"]
    assert actual.shape[0] * program.info.patches_per_token == len(inputs["pixel_values"])
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_patches_of_two_images_do_not_see_each_other() -> None:
    source, _, program = traced()
    inputs = tower_inputs(source, [[1, 4, 4], [1, 4, 4]])
    before = run(program, program.graphs["vision"], inputs)["out"]
    inputs["pixel_values"][16:] += 1
    after = run(program, program.graphs["vision"], inputs)["out"]
    torch.testing.assert_close(before[:4], after[:4])
    assert not torch.allclose(before[4:], after[4:], atol=1e-3)


def test_the_nominal_image_and_the_size_of_the_output() -> None:
    _, _, program = traced()
    about = program.info
    assert (about.grid, about.patches_per_token, about.tokens_per_image) == ((16, 16), 4, 256)
    assert about.image_size == (3, 16 * 2 * 8, 16 * 2 * 8)
    text = program.to_text("vision")
    assert "cu_seqlens = input(int32, images + 1)" in text
    assert text.splitlines()[-2].endswith("float32[(patches//4), 32]")


def test_text_form_join_and_meta() -> None:
    source, joint, program = traced()
    decoders.check_forms(program, joint)
    assert trace_program(qwen2_vl(device="meta")).to_text() == program.to_text()
    assert source.config._attn_implementation == "sdpa"
    assert source.config.vision_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_passes_apply_and_save_prefill_work(pipeline: str) -> None:
    _, _, program = traced()
    pruned = apply_pipeline(program.copy(), pipeline)
    dense, less = (cost_of(p, visual_tokens=64, text_tokens=8) for p in (program, pruned))
    assert less.prefill.flops < dense.prefill.flops
    assert less.vision.flops == dense.vision.flops > 0


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_with_equal_rows_a_pruned_program_is_that_of_the_plain_qwen2_decoder(pipeline: str) -> None:
    """M-RoPE with three equal rows is ordinary RoPE: two families, two traces, one function."""
    mine, other = (apply_pipeline(p.copy(), pipeline) for p in (traced()[2], plain()))
    for prefix in (2, -1):
        decoders.check_same(mine, prompt(rows=1, prefix=prefix), other, decoders.prompt(visual=12, prefix=prefix))


def test_what_cannot_be_traced_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"sliding window attention \(16 tokens\) is not supported"):
        trace_program(qwen2_vl("meta", text={"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}))
    with pytest.raises(UnsupportedModelError, match=r"patch_size \[8, 8\] is not supported; one number is"):
        source = qwen2_vl("meta")
        source.config.vision_config.patch_size = [8, 8]
        trace_program(source)
