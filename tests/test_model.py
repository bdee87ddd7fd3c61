"""An optimized model behaves as the transformers model it came from."""

import pytest
import torch
from transformers import TextStreamer

from foveate import optimize
from foveate.errors import BackendError, InputError, UnsupportedModelError
from foveate.models.random import random_inputs, random_llava

PROMPTS = [
    {},
    {"batch": 4, "padding": "left"},
    {"batch": 4, "padding": "right"},
    {"batch": 2, "images": 0},
    {"batch": 2, "images": 3},
    {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"},
    {"batch": 1, "prefix": 0},
    {"batch": 1, "text_tokens": 80},
]


@pytest.fixture(scope="module", params=[4, 2], ids=["mha", "gqa"])
def pair(request):
    model = random_llava(layers=3, heads=4, kv_heads=request.param)
    return model, optimize(model)


def last_logits(model, inputs):
    with torch.inference_mode():
        logits = model(**inputs).logits
    last = inputs["attention_mask"].cumsum(1).argmax(1)
    return logits[torch.arange(len(last)), last]


@pytest.mark.parametrize("prompt", PROMPTS, ids=str)
def test_without_passes_logits_equal_the_hugging_face_model(pair, prompt):
    model, optimized = pair
    inputs = random_inputs(model, seed=1, **prompt)
    with torch.inference_mode():
        out = optimized(**inputs)
    assert out.logits.shape == (len(inputs["input_ids"]), 1, model.config.text_config.vocab_size)
    assert (out.logits[:, 0] - last_logits(model, inputs)).abs().max() < 1e-4


@pytest.mark.parametrize("prompt", [p for p in PROMPTS if p.get("padding") != "right"], ids=str)
def test_without_passes_greedy_tokens_equal_the_hugging_face_model(pair, prompt):
    model, optimized = pair
    inputs = random_inputs(model, seed=2, **prompt)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(optimized.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.slow
def test_without_passes_digits_answers_as_the_hugging_face_model_does():
    from foveate.models import digits

    model, processor = digits.load()
    optimized = optimize(model)
    asked = digits.samples(task="mixed", n=4, seed=11)
    several = "USER: <image>\n<image>\n{} ASSISTANT:"
    prompts = [
        ([s.image for s in asked], [s.prompt for s in asked]),
        ([asked[0].image], [asked[0].prompt]),
        ([s.image for s in asked[:3]], [several.format(asked[1].question), asked[2].prompt]),
        (None, ["USER: read row 3 . ASSISTANT:"]),
    ]
    for images, text in prompts:
        inputs = processor(images=images, text=text, padding=True, return_tensors="pt")
        with torch.inference_mode():
            error = (optimized(**inputs).logits[:, 0] - last_logits(model, inputs)).abs().max()
        assert error < 1e-4
        options = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(optimized.generate(**inputs, **options), model.generate(**inputs, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 5, "temperature": 0.7},
        {"do_sample": True, "num_return_sequences": 3},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 4, "eos_token_id": list(range(0, 120, 2))},
        {"use_cache": False},
    ],
    ids=str,
)
def test_generation_options_do_what_they_do_for_the_hugging_face_model(pair, options):
    model, optimized = pair
    inputs = random_inputs(model, batch=2, padding="left")
    found = []
    for each in (model, optimized):
        torch.manual_seed(0)
        found.append(each.generate(**inputs, max_new_tokens=6, **options))
    assert torch.equal(*found)


def test_beams_give_every_copy_of_a_row_all_its_images(pair):
    model, optimized = pair
    two = random_inputs(model, batch=2, images=2)
    one = {
        "input_ids": two["input_ids"][:1],
        "attention_mask": two["attention_mask"][:1],
        "pixel_values": two["pixel_values"][:2],
    }
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    together, alone = optimized.generate(**two, **options), optimized.generate(**one, **options)
    assert torch.equal(together[:1], alone)


def test_streamers_see_the_tokens_as_they_come(pair):
    model, optimized = pair
    seen = []

    class Collect(TextStreamer):
        def __init__(self):
            pass

        def put(self, value):
            seen.append(value.flatten().tolist())

        def end(self):
            seen.append("end")

    inputs = random_inputs(model)
    out = optimized.generate(**inputs, max_new_tokens=3, do_sample=False, streamer=Collect())
    assert [t for part in seen[1:-1] for t in part] == out[0, -3:].tolist()
    assert seen[-1] == "end"


def test_return_dict_scores_equal_the_hugging_face_model(pair):
    model, optimized = pair
    inputs = random_inputs(model, batch=2)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    ours, theirs = optimized.generate(**inputs, **options), model.generate(**inputs, **options)
    for a, b in zip(ours.scores, theirs.scores, strict=True):
        assert (a - b).abs().max() < 1e-4


def test_a_prompt_may_end_in_an_image(pair):
    model, optimized = pair
    inputs = random_inputs(model, batch=2)
    end = int((inputs["input_ids"][0] == model.config.image_token_id).nonzero().max()) + 1
    inputs["input_ids"], inputs["attention_mask"] = inputs["input_ids"][:, :end], inputs["attention_mask"][:, :end]
    assert (optimized(**inputs).logits[:, 0] - last_logits(model, inputs)).abs().max() < 1e-4


def test_one_token_prompt(pair):
    model, optimized = pair
    inputs = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    assert (optimized(**inputs).logits[:, 0] - last_logits(model, inputs)).abs().max() < 1e-4


def test_several_tokens_may_continue_a_cache(pair):
    model, optimized = pair
    inputs = random_inputs(model, batch=2)
    more = torch.tensor([[3, 4, 5], [6, 7, 8]])
    with torch.inference_mode():
        cache = optimized(**inputs).past_key_values
        continued = optimized(input_ids=more, past_key_values=cache).logits
        longer = torch.cat([inputs["input_ids"], more], 1)
        whole = optimized(input_ids=longer, pixel_values=inputs["pixel_values"]).logits
    assert (continued - whole).abs().max() < 1e-4


def test_moving_reaches_every_weight_and_buffer_and_casting_is_refused(pair):
    model, optimized = pair
    inputs = random_inputs(model)
    before = optimized(**inputs).logits
    moved = optimize(model)
    moved._apply(lambda t: t.clone())
    assert torch.equal(moved(**inputs).logits, before)
    frequencies = "model.language_model.rotary_emb.inv_freq"
    moved.weights.get(frequencies).zero_()
    assert not torch.allclose(moved(**inputs).logits, before)
    with pytest.raises(InputError, match=r"cast the original model to torch\.float16"):
        moved.half()
    assert moved.dtype == torch.float32


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_bfloat16(backend):
    model = random_llava(layers=2, dtype=torch.bfloat16)
    optimized = optimize(model, "fastv{layer=1,keep=0.5},drop-visual-heads{keep=2,from_layer=1}", backend=backend)
    exact = optimize(random_llava(layers=2), "fastv{layer=1,keep=0.5},drop-visual-heads{keep=2,from_layer=1}")
    inputs = random_inputs(model)
    with torch.inference_mode():
        out, reference = optimized(**inputs), exact(**{**inputs, "pixel_values": inputs["pixel_values"].float()})
    assert out.logits.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(out.logits.float(), reference.logits, dim=-1).min() > 0.98


@pytest.mark.slow
def test_inductor_equals_eager_for_prompts_of_any_size():
    model = random_llava(layers=3, heads=4, kv_heads=2)
    text = "drop-visual-heads{keep=2,from_layer=1},drop-visual-neurons{keep=0.5},fastv{layer=1,keep=0.5}"
    eager, compiled = (optimize(model, text, backend=backend) for backend in ("eager", "inductor"))
    for prompt in ({}, {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left"}):
        inputs = random_inputs(model, **prompt)
        with torch.inference_mode():
            assert (eager(**inputs).logits - compiled(**inputs).logits).abs().max() < 1e-4
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(eager.generate(**inputs, **options), compiled.generate(**inputs, **options))


def test_the_report_names_every_pass(pair):
    model, _ = pair
    optimized = optimize(model, "fastv{layer=1,keep=0.25},cut-visual{from_layer=2}")
    text = str(optimized.report())
    assert "fastv{layer=1,keep=0.25}" in text and "cut-visual{from_layer=2}" in text


def test_wrong_inputs_are_named(pair):
    model, optimized = pair
    inputs = random_inputs(model)
    wrong = [
        ({**inputs, "pixel_values": inputs["pixel_values"][:0]}, "hold 16 image tokens"),
        ({**inputs, "pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)}, "2 images"),
        ({**inputs, "pixel_values": inputs["pixel_values"][:, :, :8]}, "pixel_values has shape"),
        ({k: v for k, v in inputs.items() if k != "pixel_values"}, "0 images"),
        ({**inputs, "attention_mask": inputs["attention_mask"][:, :3]}, "attention_mask has shape"),
        ({**inputs, "attention_mask": inputs["attention_mask"] * 0}, "all zero"),
        ({"pixel_values": inputs["pixel_values"]}, "input_ids is missing"),
        ({**inputs, "labels": inputs["input_ids"][:, 1:]}, "labels have shape"),
        ({**inputs, "labels": inputs["input_ids"] * 0 - 100}, "every label is -100"),
        ({**inputs, "output_attentions": True}, "output_attentions"),
        ({"input_ids": inputs["input_ids"][0]}, "input_ids has shape"),
        ({"input_ids": torch.tensor([[5, 100000]])}, "100000"),
    ]
    for bad, message in wrong:
        with pytest.raises(InputError, match=message):
            optimized(**bad)


def test_unsupported_models_and_backends_are_refused_by_name(pair):
    model, _ = pair
    with pytest.raises(BackendError, match="'tpu' is not known; there are: eager, inductor, onnx"):
        optimize(model, backend="tpu")
    with pytest.raises(UnsupportedModelError, match="'llama' is not supported; supported: llava"):
        optimize(model.model.language_model)
    with pytest.raises(UnsupportedModelError, match="not a transformers model"):
        optimize(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedModelError, match="no language head"):
        optimize(model.model)
