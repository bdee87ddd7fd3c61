"""The tokenizer, the processor and their agreement with what the training feeds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaProcessor

from foveate.models.digits import prompt_for, samples, weights_path
from foveate.models.digits.processing import VISUAL_TOKENS, build_processor
from foveate.models.digits.questions import Question, parse_question
from foveate.models.digits.sequences import NO_LOSS, encode, to_tensor


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return build_processor()


def test_one_image_becomes_144_tokens_with_text_on_both_sides(processor: LlavaProcessor) -> None:
    sample = samples(n=1)[0]
    inputs = processor(text=sample.prompt, images=sample.image, return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    assert ids.count(image) == VISUAL_TOKENS == 144
    places = [place for place, token in enumerate(ids) if token == image]
    assert places == list(range(places[0], places[0] + 144))
    assert places[0] == 2 and places[-1] < len(ids) - 4
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)


@pytest.mark.parametrize("task", ["lookup", "count", "row"])
def test_training_and_evaluation_see_the_same_tokens(processor: LlavaProcessor, task: str) -> None:
    sample = samples(task=task, n=1, seed=4)[0]
    inputs = processor(text=sample.prompt, images=sample.image, return_tensors="pt")
    asked = inputs["input_ids"][0].tolist()
    sequence = encode([parse_question(sample.question)], sample.grid, processor.tokenizer.get_vocab())
    assert sequence.ids[: len(asked)] == asked
    answer = processor.tokenizer(f"{sample.answer} </s>", add_special_tokens=False)["input_ids"]
    assert sequence.ids[len(asked) :] == answer
    assert sequence.labels == [NO_LOSS] * len(asked) + answer
    assert processor.tokenizer.unk_token_id not in sequence.ids


def test_places_name_the_cell_each_answer_word_is_read_from(processor: LlavaProcessor) -> None:
    grid = samples(n=1)[0].grid
    asked = [Question("count", digit=1), Question("lookup", row=2, column=1), Question("row", row=3)]
    sequence = encode(asked, grid, processor.tokenizer.get_vocab())
    places = [place for place in sequence.places if place != NO_LOSS]
    assert places == [9, 12, 13, 14, 15]
    for token, place in zip(sequence.ids, sequence.places, strict=True):
        if place != NO_LOSS:
            assert processor.tokenizer.convert_ids_to_tokens(token) == grid[place // 4][place % 4]


def test_training_and_evaluation_see_the_same_pixels(processor: LlavaProcessor) -> None:
    image = samples(n=1)[0].image
    processed = processor(text=prompt_for("read row 1 ."), images=image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(processed, to_tensor([np.asarray(image)[:, :, 0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("text", ["READ ROW 3 .", "read row 3.", "  Read   row 3\n.", "read row 3 ."], ids=repr)
def test_case_and_spacing_do_not_matter(processor: LlavaProcessor, text: str) -> None:
    assert processor.tokenizer.tokenize(text) == ["read", "row", "3", "."]


def test_numbers_are_single_tokens_and_strangers_are_unknown(processor: LlavaProcessor) -> None:
    tokenizer = processor.tokenizer
    assert tokenizer.tokenize("16 7 empty zebra") == ["16", "7", "empty", "<unk>"]
    assert tokenizer.decode(tokenizer("7 empty 0 4")["input_ids"], skip_special_tokens=True) == "7 empty 0 4"


def test_padding_is_on_the_left(processor: LlavaProcessor) -> None:
    drawn = [samples(task=task, n=1)[0] for task in ("row", "lookup")]
    inputs = processor(
        text=[sample.prompt for sample in drawn],
        images=[sample.image for sample in drawn],
        padding=True,
        return_tensors="pt",
    )
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][1, 0] == 1
    assert inputs["input_ids"][0, 0] == processor.tokenizer.pad_token_id


def test_the_chat_template_gives_the_prompt(processor: LlavaProcessor) -> None:
    question = "how many 3 are there ?"
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == prompt_for(question)


def test_the_packaged_processor_equals_the_built_one(processor: LlavaProcessor) -> None:
    packaged = AutoProcessor.from_pretrained(weights_path(), local_files_only=True)
    assert isinstance(packaged, LlavaProcessor)
    assert packaged.chat_template == processor.chat_template
    assert packaged.tokenizer.padding_side == "left"
    sample = samples(n=1, seed=8)[0]
    theirs, ours = (
        each(text=sample.prompt, images=sample.image, return_tensors="pt") for each in (packaged, processor)
    )
    assert torch.equal(theirs["input_ids"], ours["input_ids"])
    assert torch.equal(theirs["pixel_values"], ours["pixel_values"])
