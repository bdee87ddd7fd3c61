"""The bundled weights: their form, and what they score on held-out digits."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from foveate.models.digits import load, samples, weights_path
from foveate.models.digits.evaluate import accuracy, answers
from foveate.models.digits.saving import MOST_BYTES

Loaded = tuple[LlavaForConditionalGeneration, LlavaProcessor]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load()


def test_the_weights_are_small_and_stored_as_float16() -> None:
    path = weights_path() / "model.safetensors"
    assert path.stat().st_size <= MOST_BYTES
    with safe_open(path, framework="pt") as stored:
        kinds = {stored.get_slice(name).get_dtype() for name in stored.keys()}  # noqa: SIM118
    assert kinds == {"F16"}


def test_load_gives_float32_in_evaluation_mode(loaded: Loaded) -> None:
    model, _ = loaded
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not model.training


def test_plain_from_pretrained_upcasts_too(loaded: Loaded) -> None:
    model, _ = loaded
    plain = LlavaForConditionalGeneration.from_pretrained(weights_path(), local_files_only=True)
    assert plain.dtype == torch.float32
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_the_architecture_has_every_part_of_a_large_llava(loaded: Loaded) -> None:
    config = loaded[0].config
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")
    assert config.vision_config.num_hidden_layers >= 5
    assert config.text_config.num_hidden_layers >= 10
    assert config.text_config.num_attention_heads == config.text_config.num_key_value_heads == 8


@pytest.mark.parametrize(("task", "n", "least"), [("lookup", 60, 0.95), ("row", 30, 0.9)])
def test_held_out_accuracy(loaded: Loaded, task: str, n: int, least: float) -> None:
    assert accuracy(*loaded, samples(task=task, n=n, seed=99)) >= least


def test_a_count_is_answered_with_a_number(loaded: Loaded) -> None:
    assert all(said.isdigit() for said in answers(*loaded, samples(task="count", n=16, seed=99)))


def test_without_the_image_the_answers_are_near_chance(loaded: Loaded) -> None:
    model, processor = loaded
    drawn = samples(task="lookup", n=40, seed=99)
    black = [type(sample)(**{**vars(sample), "image": sample.image.point(lambda _: 0)}) for sample in drawn]
    assert accuracy(model, processor, black) < 0.5


def test_a_batch_answers_as_one_by_one(loaded: Loaded) -> None:
    drawn = samples(task="mixed", n=9, seed=11)
    assert answers(*loaded, drawn, batch=9) == answers(*loaded, drawn, batch=1)


def test_an_answer_ends_by_itself(loaded: Loaded) -> None:
    model, processor = loaded
    sample = samples(task="row", n=1, seed=11)[0]
    inputs = processor(text=sample.prompt, images=sample.image, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=12)
    fresh = out[0, inputs["input_ids"].shape[1] :].tolist()
    assert len(fresh) == 5 and fresh[-1] == processor.tokenizer.eos_token_id


def test_missing_weights_are_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load()
