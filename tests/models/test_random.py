"""Random models and inputs: sizes, determinism, scale, and what a LLaVA processor would give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.models.random import BOS_ID, PAD_ID, random_inputs, random_llava


def test_the_sizes_are_the_asked_ones() -> None:
    model = random_llava(
        layers=2, hidden=48, heads=6, kv_heads=3, ffn=40, visual_tokens=9, vision_layers=4,
        vision_hidden=24, vocab=50,
    )  # fmt: skip
    text, vision = model.config.text_config, model.config.vision_config
    assert (text.num_hidden_layers, text.hidden_size, text.intermediate_size) == (2, 48, 40)
    assert (text.num_attention_heads, text.num_key_value_heads, text.vocab_size) == (6, 3, 50)
    assert (vision.num_hidden_layers, vision.hidden_size, vision.image_size) == (4, 24, 24)
    assert (model.config.vision_feature_layer, model.config.vision_feature_select_strategy) == (-2, "default")
    assert not model.training
    features = model.get_image_features(torch.randn(2, 3, 24, 24)).pooler_output
    assert [tuple(image.shape) for image in features] == [(9, 48), (9, 48)]


def test_the_seed_decides_and_the_global_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    first = random_llava(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = random_llava(seed=1), random_llava(seed=2)
    half = random_llava(seed=1, dtype=torch.bfloat16)
    for name, weight in first.named_parameters():
        assert torch.equal(weight, again.get_parameter(name))
        assert torch.equal(weight.bfloat16(), half.get_parameter(name))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    # Rotary frequencies lose their meaning in half precision.
    assert half.model.language_model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_7b_model_on_the_meta_device() -> None:
    model = random_llava(
        layers=32, hidden=4096, heads=32, ffn=11008, visual_tokens=576, vision_layers=24, vision_hidden=1024,
        vision_heads=16, vocab=32064, dtype=torch.bfloat16, device="meta",
    )  # fmt: skip
    assert all(weight.is_meta and weight.dtype == torch.bfloat16 for weight in model.parameters())
    assert 7.0e9 < sum(weight.numel() for weight in model.parameters()) < 7.2e9


@pytest.mark.parametrize("layers", [2, 12])
@torch.no_grad()
def test_attention_is_peaked_and_logits_differ(layers: int) -> None:
    model = random_llava(layers=layers)
    model.set_attn_implementation("eager")
    inputs = random_inputs(model)
    output = model(**inputs, output_attentions=True, output_hidden_states=True)
    uniform = 1 / inputs["input_ids"].shape[1]
    for weights in output.attentions:
        assert weights[:, :, -1].amax(-1).mean() > 3 * uniform
    assert all(0.3 < hidden.std() < 30 for hidden in output.hidden_states)
    assert output.logits[0].argmax(-1).unique().numel() > 3
    other = model(**{**inputs, "pixel_values": -inputs["pixel_values"]}).logits
    assert (other - output.logits)[:, -1].abs().max() > 0.1
    assert torch.all(output.logits[..., model.config.image_token_id] == 0)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"visual_tokens": 15}, "square number"),
        ({"visual_tokens": 0}, "square number"),
        ({"hidden": 60, "heads": 8}, "hidden must be"),
        ({"heads": 4, "kv_heads": 3}, "heads must be"),
        ({"vision_hidden": 33}, "vision_hidden must be"),
        ({"vocab": 3}, "vocab must be"),
    ],
)
def test_wrong_sizes_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_llava(**sizes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> Any:
    return random_llava(layers=1, hidden=16, heads=2, ffn=16, visual_tokens=4, vision_layers=1)


def spans(model: Any, row: Tensor) -> list[int]:
    """Lengths of the runs of one row, positive for images and negative for text."""
    lengths: list[int] = []
    for token in (row == model.config.image_token_id).tolist():
        step = 1 if token else -1
        if lengths and lengths[-1] * step > 0:
            lengths[-1] += step
        else:
            lengths.append(step)
    return lengths


def test_one_row_is_text_images_text(model: Any) -> None:
    inputs = random_inputs(model, images=3, text_tokens=10, prefix=4)
    assert spans(model, inputs["input_ids"][0]) == [-4, 4, -1, 4, -1, 4, -4]
    assert inputs["input_ids"][0, 0] == BOS_ID
    assert inputs["attention_mask"].all()
    assert inputs["pixel_values"].shape == (3, 3, 16, 16)
    assert spans(model, random_inputs(model, prefix=0, text_tokens=2)["input_ids"][0]) == [4, -2]


def test_no_image_gives_no_pixels(model: Any) -> None:
    inputs = random_inputs(model, batch=2, images=0)
    assert sorted(inputs) == ["attention_mask", "input_ids"]
    assert inputs["input_ids"].shape == (2, 12)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_ragged_rows_are_padded(model: Any, padding: Any) -> None:
    inputs = random_inputs(model, images_per_row=[2, 0, 1], text_tokens=9, padding=padding)
    ids, attended = inputs["input_ids"], inputs["attention_mask"].bool()
    assert attended.sum(1).tolist() == [9 + 8, 8, 7 + 4]
    assert torch.all(ids[~attended] == PAD_ID)
    assert (ids[attended] == PAD_ID).sum() == 0
    padded_side = attended[:, 0] if padding == "left" else attended[:, -1]
    assert padded_side.tolist() == [True, False, False]
    assert [spans(model, row[real]) for row, real in zip(ids, attended, strict=True)] == [
        [-3, 4, -1, 4, -5],
        [-8],
        [-3, 4, -4],
    ]
    assert len(inputs["pixel_values"]) == 3
    assert torch.isfinite(model(**inputs).logits).all()


def test_padding_gives_rows_of_different_lengths(model: Any) -> None:
    assert random_inputs(model, batch=3, padding="left")["attention_mask"].sum(1).tolist() == [16, 15, 14]


def test_inputs_depend_on_the_seed(model: Any) -> None:
    first, again, other = (random_inputs(model, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["input_ids"], other["input_ids"])
    assert not torch.equal(first["pixel_values"], other["pixel_values"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"images_per_row": [1, 2]}, "need padding"),
        ({"images_per_row": [1, 2], "batch": 3, "padding": "left"}, "images_per_row has 2 rows"),
        ({"padding": "middle"}, "padding must be"),
        ({"text_tokens": 3}, "at least 4"),
        ({"batch": 0}, "at least one row"),
        ({"images": -1}, "negative"),
    ],
)
def test_wrong_inputs_are_refused(model: Any, asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_inputs(model, **asked)
