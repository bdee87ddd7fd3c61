"""LLaVA-OneVision: the traced graphs are the model; tiles, shrunk images and pooled frames fall into place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import foveate
import foveate.kernels  # registers what the ops compute
from foveate.errors import InputError, UnsupportedModelError
from foveate.ir.program import Program
from foveate.models import anyres, llava_onevision
from foveate.models.registry import FAMILIES, trace_program
from foveate.report.kept import kept_masks
from tests.ir.programs import once
from tests.models import decoders, tiny
from tests.models.decoders import prompt
from tests.models.prompts import made
from tests.models.tiny import HIDDEN, random, run
from tests.oracle.masked import masked_forward

each = pytest.mark.parametrize("decoder", llava_onevision.DECODERS)


@once
def traced(decoder: str = "qwen2") -> tuple[Any, fx.Graph, Program]:
    """A model, its joint decoder and its program; nobody may change them."""
    source = tiny.llava_onevision(decoder)
    return source, *decoders.traced(source)


@once
def optimized() -> Any:
    return foveate.optimize(traced()[0], "", traced=traced()[2])


@each
def test_the_graphs_are_the_transformers_decoder(decoder: str) -> None:
    source, joint, program = traced(decoder)
    decoders.check_joint(source, program, joint, prompt(visual=8))
    decoders.check_split(source, program, prompt(visual=8, prefix=-1))
    decoders.check_forms(program, joint)
    assert trace_program(tiny.llava_onevision(decoder, "meta")).to_text() == program.to_text()


@pytest.mark.parametrize("layer", [-1, -2, [0, -1]])
def test_the_vision_graph_gives_each_tile_the_newline_behind_its_patches(layer: Any) -> None:
    source = tiny.llava_onevision(vision_feature_layer=layer)
    program = decoders.traced(source)[1]
    pixels = random(2, 1, 3, 26, 26)
    found = run(program, program.graphs["vision"], {"pixel_values": pixels[:, 0]})["out"]
    assert found.shape == (2, 9 + 1, HIDDEN)
    with torch.no_grad():
        sizes, two = torch.tensor([[26, 26], [5, 9]]), torch.tensor([2])
        seen = source.get_image_features(pixels, sizes, batch_num_images=two, return_dict=True)
    torch.testing.assert_close(found, torch.stack(list(seen.pooler_output)), rtol=1e-5, atol=1e-5)


def test_random_batches_with_videos_are_answered_as_by_transformers() -> None:
    source, mine = traced()[0], optimized()
    for seed, rows in enumerate([[[1, 1], [3, 0]], [[0, 2]], [[2, 1], [0, 0], [1, 2]], [[0, 1], [1, 0]]] * 2):
        inputs = made(source, 40 + seed, rows, padding="right" if seed > 3 else "left").inputs
        with torch.no_grad():
            expected = masked_forward(source, inputs).logits
            torch.testing.assert_close(mine(**inputs).logits[:, 0], expected, rtol=0, atol=1e-4)


def test_images_without_their_number_are_each_cut() -> None:
    """As transformers takes them where `batch_num_images` is missing."""
    source, mine = traced()[0], optimized()
    inputs = made(source, 8, [[1], [1], [1]]).inputs
    rest = {name: value for name, value in inputs.items() if name != "batch_num_images"}
    with torch.no_grad():
        assert torch.equal(mine(**rest).logits, mine(**inputs).logits)
        torch.testing.assert_close(mine(**rest).logits[:, 0], source(**rest).logits[:, -1], rtol=0, atol=1e-4)


def test_beams_keep_each_prompts_images_and_videos() -> None:
    source, mine = traced()[0], optimized()
    inputs = made(source, 3, [[0, 1], [2, 0], [1, 1]]).inputs
    both = mine.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
    for row in range(3):
        counts = [[0, 2, 1][:row], [0, 2, 1][: row + 1]]
        images, clips = slice(*map(sum, counts)), slice(sum([1, 0, 1][:row]), sum([1, 0, 1][: row + 1]))
        alone = {name: inputs[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        if images.stop > images.start:
            alone |= {name: inputs[name][images] for name in ("pixel_values", "image_sizes")}
            alone["batch_num_images"] = torch.tensor([images.stop - images.start])
        if clips.stop > clips.start:
            alone["pixel_values_videos"] = inputs["pixel_values_videos"][clips]
        assert torch.equal(mine.generate(**alone, max_new_tokens=4, num_beams=2, do_sample=False)[0], both[row])


def test_the_tiles_of_images_may_come_without_padding() -> None:
    source, mine = traced()[0], optimized()
    inputs = made(source, 9, [[1], [2], [1]]).inputs
    images = zip(inputs["image_sizes"].tolist(), (True, False, False, True), strict=True)
    counts = [llava_onevision._tiles(traced()[2].info, image) for image in images]
    tiles = torch.cat([x[:n] for x, n in zip(inputs["pixel_values"], counts, strict=True)])
    with torch.no_grad():
        assert torch.equal(mine(**{**inputs, "pixel_values": tiles}).logits, mine(**inputs).logits)
        two, one = (
            mine.generate(**{**inputs, "pixel_values": pixels}, max_new_tokens=3, num_beams=2, do_sample=False)
            for pixels in (tiles, inputs["pixel_values"])
        )
    assert torch.equal(two, one)


def shrinks(source: Any, seed: int) -> bool:
    """Whether the image of a prompt that `made` makes has too many tiles."""
    info, (size,) = traced()[2].info, made(source, seed, [[1, 1]]).inputs["image_sizes"].tolist()
    return llava_onevision.shrunk(info, anyres.detail(info, size).shape) is not None


def test_gradients_reach_the_tower_through_shrunk_images_and_pooled_frames(tmp_path: Any) -> None:
    source = tiny.llava_onevision()
    mine = foveate.optimize(source, "cut-visual{from_layer=1}")
    inputs = next(made(source, seed, [[1, 1]]).inputs for seed in range(20) if shrinks(source, seed))
    mine(**inputs, labels=inputs["input_ids"]).loss.backward()
    for weight in (source.model.image_newline, source.model.vision_tower.embeddings.patch_embedding.weight):
        assert weight.grad is not None
        assert bool(weight.grad.any())
    mine.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(foveate.load(tmp_path / "saved")(**inputs).logits, mine(**inputs).logits)


def test_masks_and_pictures_are_those_of_tiles_shrunk_images_and_frames() -> None:
    source, _, program = traced()
    pixels = random(2, 10, 3, 26, 26)
    sizes = torch.tensor([[26, 52], [78, 78]])  # two tiles side by side, and nine, shrunk to 4 x 4
    given = {"pixel_values": pixels, "image_sizes": sizes, "pixel_values_videos": random(1, 2, 3, 26, 26)}
    image, video = source.config.image_token_id, source.config.video_token_id
    ids = torch.tensor([[image] * (9 + 3 * 7 + 9 + 4 * 5) + [video] * (2 * 4 + 1)])
    masks = kept_masks(program.info, {"input_ids": ids, **given}, range(0, 9))
    assert [(len(mask), len(mask[0])) for mask in masks] == [*[(3, 3)] * 4, (4, 4), (2, 2), (2, 2)]
    assert [sum(map(sum, mask)) for mask in masks] == [9, 0, 0, 0, 0, 0, 0]
    pictures = FAMILIES["llava_onevision"].pictures(program.info, given)
    assert [tuple(picture.shape[1:]) for picture in pictures] == [*[(26, 26)] * 4, (78, 78), (26, 26), (26, 26)]
    assert torch.equal(pictures[4][:, 26:52, 52:], pixels[1, 1 + 3 + 2])


# --- what does not fit, and what is not supported -------------------------------------------------------


def changed(inputs: dict[str, Tensor]) -> list[tuple[dict[str, Any], str]]:
    sizes, pixels, frames = inputs["image_sizes"], inputs["pixel_values"], inputs["pixel_values_videos"]
    return [
        ({"image_sizes": None}, "pixel_values and image_sizes belong together"),
        ({"image_sizes": sizes[:2]}, r"batch_num_images \[1, 2\] counts 3 images, and image_sizes has 2"),
        ({"batch_num_images": torch.tensor([2, 2])}, r"batch_num_images \[2, 2\] counts 4 images"),
        (
            {"batch_num_images": torch.tensor([2, 1])},
            r"image tokens, and what is given makes|image_sizes make \[1, 1, \d",
        ),
        ({"batch_num_images": torch.tensor([[3]])}, r"batch_num_images \[\[3\]\] counts 3 images"),
        ({"pixel_values": pixels[:2]}, r"pixel_values has shape \(2, .*\), and image_sizes make \[\d, 1, 1\] tiles"),
        ({"pixel_values": None, "image_sizes": None}, "counts 3 images, and image_sizes has 0"),
        ({"pixel_values_videos": frames[:, :, :, :5]}, r"this model takes \[videos, frames, 3, 26, 26\]"),
        ({"pixel_values_videos": frames[0]}, r"pixel_values_videos has shape \(\d, 3, 26, 26\)"),
        ({"pixel_values_videos": frames[:, :0]}, r"the prompts hold \d+ video tokens, and what is given makes 1:"),
        ({"pixel_values_videos": None}, r"the prompts hold \d+ video tokens, and what is given makes 0"),
        ({"vision_aspect_ratio": "anyres_max_4"}, "does not take vision_aspect_ratio; it takes input_ids, pixel_val"),
    ]


@pytest.mark.parametrize("number", range(12))
def test_inputs_that_do_not_fit_are_refused(number: int) -> None:
    inputs = made(traced()[0], 4, [[1, 1], [2, 0]]).inputs
    changes, message = changed(inputs)[number]
    with pytest.raises(InputError, match=message):
        optimized()(**{**inputs, **changes})


def make(decoder: str = "qwen2", **changes: Any) -> Callable[[], Any]:
    return lambda: tiny.llava_onevision(decoder, "meta", **changes)


WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make("phi3"), r"decoder 'phi3' is not supported in a LLaVA-OneVision; supported: llama, qwen2"),
        (make(text=WINDOW), r"sliding window attention \(9 tokens\)"),
        (make(vision={"model_type": "clip_vision_model"}), r"vision tower 'clip_vision_model' is not supported in a"),
        (make(vision={"vision_use_head": True}), "a SigLIP tower with a pooling head is not supported"),
        (make(vision_feature_select_strategy="default"), r"'default' drops the first patch of a tower that has no CLS"),
        (make(vision_aspect_ratio="pad"), r"vision_aspect_ratio 'pad' is not supported; anyres_max_9, or another"),
        (make(image_grid_pinpoints=[[26, 60]]), r"holds \[26, 60\], which is not a whole number of tiles of 26 pix"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        trace_program(make())
