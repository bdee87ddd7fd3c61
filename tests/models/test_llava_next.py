"""LLaVA-NeXT: the traced graphs are the model for each decoder, and tiles of any image fall into place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import foveate
import foveate.kernels  # registers what the ops compute
from foveate import ops
from foveate.errors import InputError, UnsupportedModelError
from foveate.ir.program import Program, info
from foveate.models import anyres, llava_next
from foveate.models.registry import FAMILIES, trace_program
from foveate.report.kept import kept_masks
from tests.ir.programs import once
from tests.models import decoders, tiny
from tests.models.decoders import prompt
from tests.models.prompts import made
from tests.models.tiny import HIDDEN, LAYERS, random, run
from tests.oracle.anyres import packed, tiles_of

each = pytest.mark.parametrize("decoder", llava_next.DECODERS)


@once
def traced(decoder: str = "llama") -> tuple[Any, fx.Graph, Program]:
    """A model, its joint decoder and its program; nobody may change them."""
    source = tiny.llava_next(decoder)
    return source, *decoders.traced(source)


@once
def optimized() -> Any:
    return foveate.optimize(traced()[0], "", traced=traced()[2])


@each
def test_the_joint_graph_is_the_transformers_decoder(decoder: str) -> None:
    source, joint, program = traced(decoder)
    found = [n for n in joint.nodes if n.target == ops.attention]
    assert [info(n).layer for n in found] == list(range(LAYERS))
    decoders.check_joint(source, program, joint, prompt(visual=8))
    decoders.check_split(source, program, prompt(visual=8, prefix=-1))


@each
def test_text_form_join_and_meta(decoder: str) -> None:
    source, joint, program = traced(decoder)
    decoders.check_forms(program, joint)
    assert trace_program(tiny.llava_next(decoder, "meta")).to_text() == program.to_text()
    assert source.config.text_config._attn_implementation == "sdpa"


@pytest.mark.parametrize("layer", [-2, [0, -1]])
def test_the_vision_graph_gives_each_tile_the_newline_behind_its_patches(layer: Any) -> None:
    source = tiny.llava_next(vision_feature_layer=layer)
    program = decoders.traced(source)[1]
    pixels = random(3, 3, 24, 24)
    found = run(program, program.graphs["vision"], {"pixel_values": pixels})["out"]
    assert found.shape == (3, 9 + 1, HIDDEN)
    with torch.no_grad():
        states = source.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        chosen = torch.cat([states[i] for i in ([layer] if isinstance(layer, int) else layer)], dim=2)
        expected = source.model.multi_modal_projector(chosen[:, 1:])
    torch.testing.assert_close(found[:, :9], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[:, 9], source.model.image_newline.detach().expand(3, -1))


@pytest.mark.parametrize("size", [[24, 24], [1, 99], [99, 1], [40, 50], [7, 13], [97, 31], [480, 641], [47, 48]])
def test_patches_are_numbered_as_transformers_packs_them(size: list[int]) -> None:
    source, _, program = traced()
    tiles = tiles_of(source, size)
    assert anyres.tile_count(program.info, size) == tiles
    numbers = torch.arange(tiles * 9.0).view(tiles, 9, 1)
    expected = packed(source, numbers, size, torch.tensor([-1.0]))[:, 0].long()
    assert torch.equal(anyres.image_numbers(program.info, size), expected)


def test_the_tiles_of_one_image_may_come_without_padding() -> None:
    source, mine = traced()[0], optimized()
    inputs = made(source, 5, [[2], [1]]).inputs
    counts = [tiles_of(source, size) for size in inputs["image_sizes"].tolist()]
    tiles = torch.cat([x[:n] for x, n in zip(inputs["pixel_values"], counts, strict=True)])
    with torch.no_grad():
        torch.testing.assert_close(mine(**inputs).logits, mine(**{**inputs, "pixel_values": tiles}).logits)
        two = mine.generate(**{**inputs, "pixel_values": tiles}, max_new_tokens=3, num_beams=2, do_sample=False)
        one = mine.generate(**inputs, max_new_tokens=3, num_beams=2, do_sample=False)
    assert torch.equal(two, one)


def test_the_newline_learns_and_is_saved(tmp_path: Any) -> None:
    source = tiny.llava_next()
    mine = foveate.optimize(source, "cut-visual{from_layer=1}")
    inputs = made(source, 1, [[1]]).inputs
    mine(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert source.model.image_newline.grad is not None
    assert bool(source.model.image_newline.grad.any())
    mine.save_pretrained(tmp_path / "saved")
    again = foveate.load(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, mine(**inputs).logits)


def test_masks_of_what_stays_are_those_of_whole_tiles() -> None:
    """Also of tiles of which padding left few rows, or none."""
    source, _, program = traced()
    inputs = made(source, 0, [[1]]).inputs
    for size in ([8, 72], [72, 25], [1, 99]):
        places = anyres.image_numbers(program.info, size)
        ids = torch.full((1, len(places)), source.config.image_token_id)
        one = {"input_ids": ids, "image_sizes": torch.tensor([size]), "pixel_values": inputs["pixel_values"]}
        tiles = tiles_of(source, size)
        masks = kept_masks(program.info, one, range(len(places)))
        expected = torch.zeros(tiles * 9, dtype=torch.bool)
        expected[places[places >= 0]] = True
        assert torch.equal(torch.tensor(masks), expected.view(tiles, 3, 3))


def test_pictures_are_the_tiles() -> None:
    source, _, program = traced()
    inputs = made(source, 3, [[2]]).inputs
    counts = [tiles_of(source, size) for size in inputs["image_sizes"].tolist()]
    pictures = FAMILIES["llava_next"].pictures(program.info, inputs)
    assert len(pictures) == sum(counts)
    assert torch.equal(pictures[counts[0]], inputs["pixel_values"][1, 0])
    assert FAMILIES["llava_next"].pictures(program.info, {}) == []


# --- what does not fit, and what is not supported -------------------------------------------------------


def changed(inputs: dict[str, Tensor]) -> list[tuple[dict[str, Any], str]]:
    sizes, pixels = inputs["image_sizes"], inputs["pixel_values"]
    whole = pixels.shape[1]
    return [
        ({"image_sizes": None}, "pixel_values and image_sizes belong together"),
        ({"pixel_values": None}, "pixel_values and image_sizes belong together"),
        ({"image_sizes": sizes[:1]}, rf"pixel_values has shape \(2, {whole}, .*\), and image_sizes make \[\d\] tiles"),
        ({"image_sizes": sizes[:, :1]}, r"image_sizes has shape \(2, 1\)"),
        ({"image_sizes": sizes * 0}, r"holds \[\[0, 0\], \[0, 0\]\]; give \[images, 2\], the height and width"),
        ({"image_sizes": sizes.flip(1)}, r"the prompts hold \d+ image tokens, and what is given makes \d+"),
        ({"pixel_values": pixels[:, :1]}, r"this model takes \[images, most tiles, 3, 24, 24\], or \[tiles, 3, 24,"),
        ({"pixel_values": pixels[..., :5]}, r"pixel_values has shape \(2, \d, 3, 24, 5\)"),
        ({"pixel_values": pixels[:, 0]}, r"pixel_values has shape \(2, 3, 24, 24\), and image_sizes make"),
        ({"pixel_values": None, "image_sizes": None}, r"image tokens, and what is given makes 0"),
        ({"image_grid_thw": sizes}, "does not take image_grid_thw; it takes input_ids, pixel_values, image_sizes, att"),
    ]


@pytest.mark.parametrize("number", range(11))
def test_inputs_that_do_not_fit_are_refused(number: int) -> None:
    inputs = made(traced()[0], 4, [[1], [1]]).inputs
    changes, message = changed(inputs)[number]
    with pytest.raises(InputError, match=message):
        optimized()(**{**inputs, **changes})


def make(**changes: Any) -> Callable[[], Any]:
    return lambda: tiny.llava_next(device="meta", **changes)


SIGLIP = {"model_type": "siglip_vision_model"}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "factor": 2.0}
LONGROPE = {"rope_type": "longrope", **FACTORS, "original_max_position_embeddings": 64, "rope_theta": 1000.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny.llava_next("phi3", "meta"), r"decoder 'phi3' is not supported in a LLaVA-NeXT; .* llama, mis"),
        (lambda: tiny.llava_next("mistral", "meta", text={"sliding_window": 9}), r"sliding window .*\(9 tokens\)"),
        (make(vision=SIGLIP), r"vision tower 'siglip_vision_model' is not supported in a LLaVA-NeXT; a CLIP tower"),
        (make(vision_feature_select_strategy="full"), r"select_strategy 'full' keeps the CLS token"),
        (make(image_grid_pinpoints=[[24, 60]]), r"holds \[24, 60\], which is not a whole number of tiles of 24 pix"),
        (make(text={"rope_parameters": LONGROPE}), "rotary embedding 'longrope' depends on the prompt's length"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        trace_program(make())
