"""A package over numpy arrays does what the same package over torch tensors does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import foveate
from foveate.errors import BackendError, InputError
from foveate.models.random import random_inputs
from foveate.runner import NumpyModel
from foveate.runner.cache import GROWTH, ArrayWriter
from foveate.runner.device import GraphWriter
from foveate.runner.sessions import HOST, Device
from tests.ir.programs import KV_HEADS, LAYERS, TOKENS, llava, model, optimized
from tests.runner.conftest import Packaged, arrays

PIPELINES = (
    "",
    "fastv{layer=1,keep=0.5},cut-visual{from_layer=2}",
    "neighbor-attention{radius=1},drop-visual-heads{keep=0,from_layer=2}",
    pytest.param("divprune{keep=0.7},pyramiddrop{layers=[1,2],keep=0.6}", marks=pytest.mark.slow),
    "cls-curve{layer=0}",
    "snapkv{capacity=8,window=2,kernel=3}",
)
PROMPTS: tuple[dict[str, Any], ...] = (
    {},
    {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"},
    {"batch": 2, "images": 0},
    {"batch": 3, "images_per_row": [1, 2, 1], "padding": "right", "prefix": 0},
)


@pytest.mark.parametrize("passes", PIPELINES)
def test_logits_kept_tokens_and_answers_are_those_over_torch(passes: str, packaged: Packaged) -> None:
    there, here = foveate.load(packaged(passes)), foveate.load(packaged(passes), tensors="np")
    assert here.passes == [record.text for record in there.program.passes]
    for sizes in PROMPTS:
        inputs = random_inputs(model(), **sizes)
        expected, found = there(**inputs), here(**arrays(inputs))
        np.testing.assert_allclose(found.logits, expected.logits.numpy(), rtol=0, atol=1e-6)
        for a, b in ((expected.kept, found.kept), (expected.held, found.held)):
            assert (a or {}).keys() == (b or {}).keys()
            assert all(np.array_equal(places.numpy(), b[layer]) for layer, places in (a or {}).items())
        answers = there.generate(**inputs, max_new_tokens=10, do_sample=False)
        assert np.array_equal(answers.numpy(), here.generate(**arrays(inputs), max_new_tokens=10))


def test_answers_longer_than_the_cache_s_first_room(packaged: Packaged, plain: NumpyModel) -> None:
    inputs = random_inputs(model(), batch=2, images_per_row=[1, 0], padding="left")
    expected = foveate.load(packaged("")).generate(**inputs, max_new_tokens=GROWTH + 20, do_sample=False)
    assert np.array_equal(expected.numpy(), plain.generate(**arrays(inputs), max_new_tokens=GROWTH + 20))


def test_a_prompt_that_ends_in_an_image_and_several_tokens_at_once(packaged: Packaged, plain: NumpyModel) -> None:
    there = foveate.load(packaged(""))
    inputs = random_inputs(model())
    inputs["input_ids"] = torch.cat([torch.tensor([[1, 7]]), torch.full((1, TOKENS), model().config.image_token_id)], 1)
    del inputs["attention_mask"]
    expected, found = there(**inputs), plain(**arrays(inputs))
    for more in ([[5, 6, 7]], [[8]], [[9, 10]]):
        np.testing.assert_allclose(found.logits, expected.logits.numpy(), rtol=0, atol=1e-6)
        expected = there(input_ids=torch.tensor(more), cache=expected.cache)
        found = plain(more, cache=found.cache)
    np.testing.assert_allclose(found.logits, expected.logits.numpy(), rtol=0, atol=1e-6)
    assert found.cache.seen == expected.cache.seen == TOKENS + 8


def test_rows_end_and_are_filled_as_over_torch(packaged: Packaged, plain: NumpyModel) -> None:
    there = foveate.load(packaged(""))
    inputs = random_inputs(model(), batch=3, images_per_row=[1, 0, 1], padding="left")
    free = there.generate(**inputs, max_new_tokens=12, do_sample=False)[:, -12:]
    ends = [int(free[0, 3]), int(free[1, 6])]
    for options in ({"eos_token_id": ends[0], "pad_token_id": 3}, {"eos_token_id": ends, "pad_token_id": 0}):
        expected = there.generate(**inputs, max_new_tokens=12, do_sample=False, **options)
        assert np.array_equal(expected.numpy(), plain.generate(**arrays(inputs), max_new_tokens=12, **options))
        assert (expected[:, -12:] != free).any()


def test_tokens_are_streamed_as_they_come(plain: NumpyModel) -> None:
    class Streamer:
        """As transformers has them."""

        def __init__(self) -> None:
            self.said: list[Any] = []

        def put(self, value: Any) -> None:
            self.said.append(value)

        def end(self) -> None:
            self.said.append("end")

    inputs = arrays(random_inputs(model(), batch=2))
    whole = plain.generate(**inputs, max_new_tokens=5)
    called: list[Any] = []
    assert np.array_equal(plain.generate(**inputs, max_new_tokens=5, streamer=called.append), whole)
    steps = list(plain.tokens(plain(**inputs), max_new_tokens=5))
    assert np.array_equal(np.stack(called, 1), whole[:, -5:])
    assert np.array_equal(np.stack(steps, 1), whole[:, -5:])
    streamer = Streamer()
    plain.generate(**inputs, max_new_tokens=5, streamer=streamer)
    prompt, *rest, last = streamer.said
    assert np.array_equal(prompt, inputs["input_ids"]) and last == "end"
    assert np.array_equal(np.stack(rest, 1), whole[:, -5:])


def test_samples_repeat_with_their_seed_and_are_greedy_at_one(plain: NumpyModel) -> None:
    inputs = arrays(random_inputs(model(), batch=2))
    drawn = [plain.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=3.0, seed=s) for s in (1, 1, 2)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    narrow = plain.generate(**inputs, max_new_tokens=8, do_sample=True, top_k=1)
    assert np.array_equal(narrow, plain.generate(**inputs, max_new_tokens=8))


class Counting(ArrayWriter):
    """Counts the bytes that it writes."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.bytes: list[int] = []

    def write(self, buffers: Any, new: Any, start: int) -> None:
        self.bytes.append(sum(value.read().nbytes for value in new.values()))
        super().write(buffers, new, start)


def test_a_step_writes_its_own_keys_and_moves_no_cache(packaged: Packaged) -> None:
    here = foveate.load(packaged("fastv{layer=1,keep=0.5}"), tensors="np")
    here.writer = writer = Counting(here.device)
    cache = here(**arrays(random_inputs(model(), batch=2))).cache
    here([[5], [6]], cache=cache)
    places = {name: value.held.data_ptr() for name, value in cache.text.items()}
    visual = {name: value.held.data_ptr() for name, value in cache.fixed.items()}
    assert len(places) == 2 * LAYERS and visual
    writer.bytes.clear()
    steps = cache.steps
    for _ in range(GROWTH // 2):
        here([[5], [6]], cache=cache)
    width = cache.text["past_key_values.0.key"].shape[3]
    assert writer.bytes == [2 * LAYERS * 2 * KV_HEADS * width * 4] * (GROWTH // 2)
    assert cache.steps is steps
    assert places == {name: value.held.data_ptr() for name, value in cache.text.items()}
    assert visual == {name: value.held.data_ptr() for name, value in cache.fixed.items()}
    assert cache.nbytes() > 8 * writer.bytes[0]


def test_buffers_out_of_numpy_s_reach_are_written_in_place(packaged: Packaged) -> None:
    inputs = arrays(random_inputs(model(), batch=2, images_per_row=[1, 0], padding="left"))
    here = foveate.load(packaged("snapkv{capacity=8,window=2,kernel=3}"), tensors="np")
    expected = here.generate(**inputs, max_new_tokens=GROWTH + 10)
    names = [name for name in here.graphs["decode"].inputs if name.startswith("past_key_values.")]
    here.writer = GraphWriter(HOST, names, half=False)
    assert np.array_equal(here.generate(**inputs, max_new_tokens=GROWTH + 10), expected)
    buffers = {name: HOST.put(np.zeros((2, 3, 6, 4), np.float32)) for name in names}
    new = {name: HOST.put(np.full((2, 3, 2, 4), i + 1, np.float32)) for i, name in enumerate(names)}
    before = [value.held.data_ptr() for value in buffers.values()]
    here.writer.write(buffers, new, 3)
    for number, (name, at) in enumerate(zip(names, before, strict=True)):
        wanted = np.zeros((2, 3, 6, 4))
        wanted[:, :, 3:5] = number + 1
        assert buffers[name].held.data_ptr() == at
        assert np.array_equal(buffers[name].array, wanted)


@pytest.mark.slow
def test_half_precision(tmp_path: Any) -> None:
    source = llava(layers=2, dtype=torch.float16)
    opt = foveate.optimize(source, "fastv{layer=1,keep=0.5}")
    foveate.export(opt, output=tmp_path / "out", verify=False)
    there, here = foveate.load(tmp_path / "out"), foveate.load(tmp_path / "out", tensors="np")
    inputs = random_inputs(source)
    found = here(**arrays(inputs))
    assert found.logits.dtype == np.float16
    assert np.array_equal(found.logits, there(**inputs).logits.numpy())
    answers = there.generate(**inputs, max_new_tokens=6, do_sample=False)
    assert np.array_equal(answers.numpy(), here.generate(**arrays(inputs), max_new_tokens=6))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_beams": 3}, "num_beams is not heeded over numpy arrays.*without tensors='np'"),
        ({"temperature": 0.5}, "temperature: of sampling, which needs do_sample=True"),
        ({"questions": np.zeros((1, 4))}, "chooses nothing by a question"),
        ({"pixel_values": np.zeros((1, 3, 5, 5))}, r"pixel_values has shape \(1, 3, 5, 5\); this model takes"),
        ({"input_ids": [[1, 64]], "pixel_values": None, "attention_mask": None}, "holds 64; the vocabulary has 64"),
        ({"pixel_values": None}, "and 0 images of 16 tokens make 0"),
        ({"past_key_values": 5}, "past_key_values is not heeded"),
    ],
)
def test_wrong_inputs_are_one_error(plain: NumpyModel, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plain.generate(**{**arrays(random_inputs(model())), **change})


def test_a_call_refuses_what_it_does_not_take(plain: NumpyModel) -> None:
    with pytest.raises(InputError, match="does not take labels, past_key_values; it takes input_ids, pixel_values"):
        plain([[5]], labels=[[5]], past_key_values=5, return_dict=None)
    cache = plain([[5], [6]]).cache
    for ids in ([[5]], [5, 6], [[], []]):
        with pytest.raises(InputError, match=r"the cache goes on with .2, tokens."):
            plain(ids, cache=cache)


def test_what_numpy_does_not_run_is_refused(packaged: Packaged, tmp_path: Any) -> None:
    with pytest.raises(BackendError, match="steps that evict keys"):
        foveate.load(packaged("heavy-recent"), tensors="np")
    optimized("").save_pretrained(tmp_path / "saved")
    with pytest.raises(BackendError, match="is no exported package; foveate export makes one"):
        foveate.load(tmp_path / "saved", tensors="np")
    for options, message in (
        ({"backend": "eager"}, "run by the onnx backend, not by 'eager'"),
        ({"device": "tpu"}, "device 'tpu' is not known"),
        ({"device": "cuda:x"}, "device 'cuda:x' is not known"),
    ):
        with pytest.raises(InputError, match=message):
            foveate.load(packaged(""), tensors="np", **options)
    with pytest.raises(InputError, match="tensors must be 'pt' or 'np'"):
        foveate.load(packaged(""), tensors="tf")
