"""SmolVLM and Idefics3: the traced graphs are the model, and what their processors make of tiles is taken apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import foveate
from foveate import ops
from foveate.errors import InputError, PassError, UnsupportedModelError
from foveate.ir.cost import cost_of
from foveate.ir.program import Program, info
from foveate.model import OptimizedModel
from foveate.models.registry import trace_program
from foveate.models.smolvlm import _places
from foveate.passes.pipeline import apply_pipeline
from tests.ir.programs import once
from tests.models import decoders
from tests.models.decoders import PIPELINES, prompt
from tests.models.prompts import made
from tests.models.tiny import LAYERS, random, run, smolvlm
from tests.oracle.masked import masked_forward

KINDS = ("smolvlm", "idefics3")
each = pytest.mark.parametrize("kind", KINDS)


@once
def traced(kind: str) -> tuple[Any, fx.Graph, Program]:
    """A model, its joint decoder and its program; nobody may change them."""
    source = smolvlm(kind)
    return source, *decoders.traced(source)


def optimized(kind: str) -> OptimizedModel:
    source, _, program = traced(kind)
    return foveate.optimize(source, "", traced=program)


@each
def test_the_graphs_are_the_transformers_decoder(kind: str) -> None:
    source, joint, program = traced(kind)
    found = [n for n in joint.nodes if n.target == ops.attention]
    assert [info(n).layer for n in found] == list(range(LAYERS))
    decoders.check_joint(source, program, joint, prompt(visual=8))
    for prefix in (2, -1):
        decoders.check_split(source, program, prompt(visual=8, prefix=prefix))


@each
def test_text_form_join_and_meta(kind: str) -> None:
    source, joint, program = traced(kind)
    decoders.check_forms(program, joint)
    assert trace_program(smolvlm(kind, "meta")).to_text() == program.to_text()
    assert source.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("side", "scale"), [(4, 2), (19, 1)])
def test_the_vision_graph_is_the_transformers_tower_for_any_size(side: int, scale: int) -> None:
    """Of 19 rows of patches some have one position in transformers; the last pixels are in no patch."""
    source = smolvlm(image_size=3 * side + 1, patch_size=3)
    source.config.scale_factor = source.model.connector.scale_factor = scale
    features = 16 * scale**2
    source.model.connector.modality_projection.proj = torch.nn.Linear(features, 32, bias=False)
    program = trace_program(source)
    pixels = random(3, 3, 3 * side + 1, 3 * side + 1)
    with torch.no_grad():
        expected = torch.stack(source.get_image_features(pixels[:, None], return_dict=True).pooler_output)
    actual = run(program, program.graphs["vision"], {"pixel_values": pixels})["out"]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (_places(side) == list(range(side))) == (side == 4)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_passes_apply_and_save_prefill_work(pipeline: str) -> None:
    _, _, program = traced("smolvlm")
    pruned = apply_pipeline(program.copy(), pipeline)
    dense, less = (cost_of(p, visual_tokens=64, text_tokens=8) for p in (program, pruned))
    assert less.prefill.flops < dense.prefill.flops
    assert less.vision.flops == dense.vision.flops > 0


@each
def test_what_works_on_single_patches_is_refused(kind: str) -> None:
    with pytest.raises(PassError, match=rf"tome: in the tower of {kind} a token is 2 x 2 patches, and tome works on"):
        apply_pipeline(traced(kind)[2].copy(), "tome{merge=1}")


# --- what a processor makes -----------------------------------------------------------------------------


def padded(kind: str) -> dict[str, Tensor]:
    """A prompt with images, one with none, and one with fewer."""
    return made(traced(kind)[0], 3, [[2], [0], [1]]).inputs


@each
def test_masks_may_be_missing_and_tiles_may_stand_alone(kind: str) -> None:
    mine, inputs = optimized(kind), padded(kind)
    expected = mine(**inputs).logits
    real = inputs["pixel_attention_mask"].flatten(2).any(2)
    assert real.sum() < real.numel()
    alone = {name: inputs[name][real] for name in ("pixel_values", "pixel_attention_mask")}
    for changes in ({"pixel_attention_mask": None}, alone, {**alone, "pixel_attention_mask": None}):
        assert torch.equal(mine(**{**inputs, **changes}).logits, expected)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2}
    assert torch.equal(mine.generate(**{**inputs, **alone}, **options), mine.generate(**inputs, **options))


@each
def test_beams_are_those_of_transformers(kind: str) -> None:
    inputs = padded(kind)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(optimized(kind).generate(**inputs, **options), traced(kind)[0].generate(**inputs, **options))


def test_where_every_tile_is_filling_smolvlm_sees_one_and_idefics3_none() -> None:
    inputs = made(traced("smolvlm")[0], 0, [[0]]).inputs
    nothing = {"pixel_values": torch.zeros(1, 2, 3, 33, 33)}
    # Idefics3 sees no image; transformers itself fails to make none of none.
    assert torch.equal(optimized("idefics3")(**inputs, **nothing).logits, optimized("idefics3")(**inputs).logits)
    ids = torch.cat([inputs["input_ids"], torch.tensor([[63] * 4 + [5]])], 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **nothing}
    expected = masked_forward(traced("smolvlm")[0], inputs).logits
    torch.testing.assert_close(optimized("smolvlm")(**inputs).logits[:, 0], expected, rtol=0, atol=1e-4)


def shift(x: Tensor) -> Tensor:
    """The rows of other prompts."""
    return x.roll(1, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pixel_values": lambda x: x[..., :32]}, r"this model takes \[prompts, tiles of the longest, 3, 33, 33\], or"),
        ({"pixel_values": lambda x: x[0, 0]}, r"pixel_values has shape \(3, 33, 33\)"),
        ({"pixel_attention_mask": lambda x: x[:, :1]}, r"pixel_attention_mask has shape \(3, 1, 33, 33\); with these"),
        ({"pixel_attention_mask": lambda x: x * (torch.arange(33) < 20)}, "hides a part of a tile"),
        ({"pixel_values": lambda x: x[:1], "pixel_attention_mask": lambda x: x[:1]}, "the prompts hold .* image toke"),
        ({"pixel_values": lambda x: None, "pixel_attention_mask": lambda x: None}, "and 0 images of 4 tokens make 0"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Callable[[Tensor], Any]], message: str) -> None:
    inputs = padded("smolvlm")
    with pytest.raises(InputError, match=message):
        optimized("smolvlm")(**{**inputs, **{name: by(inputs[name]) for name, by in change.items()}})


def test_beams_refuse_tiles_that_lie_in_rows_of_other_prompts() -> None:
    inputs = padded("smolvlm")
    moved = {name: shift(inputs[name]) for name in ("pixel_values", "pixel_attention_mask")}
    with pytest.raises(InputError, match=r"the rows of pixel_values hold \[\d, \d, \d\] tiles, and the prompts want"):
        optimized("smolvlm").generate(**{**inputs, **moved}, max_new_tokens=2, num_beams=2)


def test_what_no_prompt_of_the_family_has_is_refused() -> None:
    with pytest.raises(
        InputError, match="does not take image_sizes; it takes input_ids, pixel_values, pixel_attention"
    ):
        optimized("smolvlm")(**padded("smolvlm"), image_sizes=torch.zeros(1))


# --- exporting ------------------------------------------------------------------------------------------


@pytest.mark.slow
@each
def test_on_onnx_runtime_the_answers_are_those_of_torch(kind: str, tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    passes = "fastv{layer=1,keep=0.5},neighbor-attention{radius=1}"
    mine = foveate.optimize(traced(kind)[0], passes, traced=traced(kind)[2])
    exported = foveate.export(mine, backend="onnx", output=tmp_path / "package")
    assert exported.parity.ok and exported.parity.tokens
    there, inputs = foveate.load(tmp_path / "package"), padded(kind)
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    torch.testing.assert_close(there(**inputs).logits, mine(**inputs).logits, rtol=0, atol=1e-4)
    assert torch.equal(there.generate(**inputs, **options), mine.generate(**inputs, **options))


# --- what is not supported ------------------------------------------------------------------------------


def with_config(part: str, **changes: Any) -> Any:
    source = smolvlm("idefics3", "meta")
    for name, value in changes.items():
        setattr(getattr(source.config, part), name, value)
    return source


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_config("vision_config", model_type="siglip"), "vision tower 'siglip' is not supported in an Ide"),
        (lambda: with_config("text_config", model_type="mistral"), "decoder 'mistral' is not supported in an Idefics3"),
        (lambda: with_config("vision_config", patch_size=[8, 8]), r"patch_size \[8, 8\] is not supported in an Idefic"),
        (lambda: smolvlm("smolvlm", "meta", image_size=40), "a tile of 5 x 5 patches cannot be shuffled by 2"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        trace_program(make())
