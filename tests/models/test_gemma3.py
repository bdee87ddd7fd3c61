"""Gemma 3: images that are seen whole, layers that see a window, and what is refused because of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import foveate
from foveate.errors import InputError, PassError, TraceError, UnsupportedModelError
from foveate.ir.attention import Attention, attentions
from foveate.ir.cost import cost_of
from foveate.ir.join import join
from foveate.ir.observe import observe
from foveate.ir.program import Program, info
from foveate.ir.rules import verify
from foveate.ir.split import split, structure
from foveate.ir.text import parse_graphs
from foveate.model import OptimizedModel
from foveate.models.registry import trace_program
from foveate.passes.pipeline import apply_pipeline
from foveate.streams import reaches
from tests.ir.programs import once
from tests.models import decoders
from tests.models.prompts import made
from tests.models.tiny import LAYERS, VOCAB, gemma3, random

IMAGE = VOCAB - 1


@once
def traced() -> tuple[Any, fx.Graph, Program]:
    """A model, its joint decoder and its program; nobody may change them."""
    source = gemma3()
    return source, *decoders.traced(source)


@once
def windows() -> tuple[Any, Program]:
    """One whose first layers see six tokens."""
    source = gemma3(kinds="sliding sliding full")
    return source, trace_program(source)


def optimized(passes: str = "") -> OptimizedModel:
    source, _, program = traced()
    return foveate.optimize(source, passes, traced=program)


def test_every_layer_says_how_far_its_tokens_see() -> None:
    _, joint, program = traced()
    for graph in (joint, program.prefill):
        assert {info(n).layer for n in attentions(graph)} == set(range(LAYERS))
        text = [n for n in attentions(graph) if info(n).stream != "visual"]
        assert [Attention.of(n).window for n in text] == [0, 6, 0]
        assert all(Attention.of(n).reach is not None for n in attentions(graph))
    assert all(Attention.of(n).reach is None for n in attentions(program.graphs["decode"]))


@pytest.mark.parametrize("kind", ["full sliding full", "sliding sliding full"])
def test_logits_and_answers_are_those_of_transformers(kind: str) -> None:
    """By its own call, masks and cache, beside the checks that all families pass."""
    source, program = (traced()[0], traced()[2]) if kind.startswith("full") else windows()
    mine = foveate.optimize(source, "", traced=program)
    for seed, rows in enumerate(([[2]], [[1], [0], [2]], [[0], [1]])):
        inputs = made(source, seed, rows).inputs
        with torch.no_grad():
            expected = source(**inputs).logits[:, -1]
        torch.testing.assert_close(mine(**inputs).logits[:, 0], expected, rtol=0, atol=1e-4)
        options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
        assert torch.equal(mine.generate(**inputs, **options), source.generate(**inputs, **options))
        options |= {"num_beams": 2, "num_return_sequences": 2}
        assert torch.equal(mine.generate(**inputs, **options), source.generate(**inputs, **options))


def test_images_without_a_word_between_them_see_each_other_and_types_may_be_missing() -> None:
    source, mine = traced()[0], optimized()
    ids = torch.tensor([[5, *[IMAGE] * 18, 7, 8, *[IMAGE] * 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": random(3, 3, 48, 48)}
    types = (ids == IMAGE).long()
    with torch.no_grad():
        expected = source(**inputs, token_type_ids=types).logits[:, -1]
        causal = source(**inputs).logits[:, -1]
    for given in ({"token_type_ids": types}, {}):
        torch.testing.assert_close(mine(**inputs, **given).logits[:, 0], expected, rtol=0, atol=1e-4)
    assert not torch.allclose(expected, causal, atol=1e-3)
    assert reaches(ids == IMAGE)[0].tolist() == [0, *[18] * 18, 19, 20, *[29] * 9]


def test_padding_on_the_right_and_hidden_tokens_do_not_change_how_far_a_token_sees() -> None:
    source, mine = traced()[0], optimized()
    inputs = made(source, 3, [[1], [2]], padding="right").inputs
    inputs["attention_mask"][1, 9:12] = 0
    with torch.no_grad():
        expected = source(**inputs, position_ids=(inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)).logits
    last = inputs["attention_mask"].shape[1] - 1 - inputs["attention_mask"].flip(1).argmax(1)
    found = mine(**inputs).logits[:, 0]
    torch.testing.assert_close(found, expected[torch.arange(2), last], rtol=0, atol=1e-4)


def test_decoding_is_the_prefill_of_the_longer_prompt() -> None:
    source, mine = traced()[0], optimized()
    inputs = made(source, 5, [[1], [2]]).inputs
    first = mine(**inputs)
    more = torch.tensor([[5, 9, 11], [6, 12, 4]])
    grown = {
        name: torch.cat([inputs[name], fill], 1)
        for name, fill in (
            ("input_ids", more),
            ("attention_mask", torch.ones_like(more)),
            ("token_type_ids", torch.zeros_like(more)),
        )
    }
    stepped = mine(input_ids=more, cache=first.cache).logits
    whole = mine(**{**inputs, **grown}).logits
    torch.testing.assert_close(stepped[:, -1:], whole, rtol=0, atol=1e-4)


def test_training_asks_image_tokens_as_transformers_does() -> None:
    """A labelled image token travels with the text, and sees its whole image all the same."""
    source, mine = traced()[0], optimized()
    inputs = made(source, 4, [[1], [1]]).inputs
    labels = torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], -100)
    labels[:, :8] = -100
    with torch.no_grad():
        found, expected = mine(**inputs, labels=labels).loss, source(**inputs, labels=labels).loss
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_text_form_join_and_meta() -> None:
    source, joint, program = traced()
    verify(program)
    again = program.copy()
    again.graphs = parse_graphs(again, program.to_text())
    verify(again)
    assert again.to_text() == program.to_text()
    assert structure(join(program, split(program, joint), inputs=True)) == structure(joint)
    assert trace_program(gemma3("meta")).to_text() == program.to_text()
    assert source.config.text_config._attn_implementation == "sdpa"


def test_a_saved_model_answers_the_same(tmp_path: Any) -> None:
    mine, inputs = optimized("cut-visual{from_layer=2}"), made(traced()[0], 6, [[1], [2]]).inputs
    mine.save_pretrained(tmp_path / "saved")
    assert torch.equal(foveate.load(tmp_path / "saved")(**inputs).logits, mine(**inputs).logits)


@pytest.mark.parametrize(
    "pipeline", ["cut-visual{from_layer=1}", "drop-visual-heads{keep=2,from_layer=0}", "fastv{layer=1,keep=0.5}"]
)
def test_passes_apply_and_save_prefill_work(pipeline: str) -> None:
    program = traced()[2]
    pruned = apply_pipeline(program.copy(), pipeline)
    dense, less = (cost_of(p, visual_tokens=64, text_tokens=8) for p in (program, pruned))
    assert less.prefill.flops < dense.prefill.flops
    assert less.vision.flops == dense.vision.flops > 0


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        (
            "fastv{layer=1,keep=0.5}",
            r"fastv: in layer 0 a token sees only the last 6 tokens, .* whole .* the layers 2$",
        ),
        ("pyramiddrop{layers=[1],keep=0.5}", r"pyramiddrop: in layer 1 a token sees only the last 6 tokens"),
        ("dart{layer=1,keep=0.5}", r"dart: the norms of gemma3 add 1 to their weights, which dart does not know"),
        ("sparsevlm{layers=[1],keeps=[0.5]}", r"sparsevlm: in layer 1 a token sees only the last 6 tokens"),
        ("neighbor-attention{radius=1}", r"neighbor-attention: in layer 0 a token sees only the last 6 tokens, which"),
        ("snapkv{capacity=12,window=6}", r"snapkv: in layer \d a token sees"),
        ("heavy-recent{heavy=8,recent=8}", r"heavy-recent: in layer \d a token sees"),
        ("cls-curve{layer=0}", r"in the tower of gemma3 a token is 2 x 2 patches, and cls-curve works on single ones"),
    ],
)
def test_passes_that_do_not_know_how_far_tokens_see_are_refused(passes: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        apply_pipeline(windows()[1].copy(), passes)


def test_layers_are_not_observed() -> None:
    _, joint, program = traced()
    dense = program.copy()
    dense.graphs["prefill"] = split(dense, joint)
    with pytest.raises(TraceError, match="layer 0 cannot be observed: a token does not see just all tokens before it"):
        observe(dense)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_type_ids": lambda x: x * 0}, r"marks 0 tokens of images, and input_ids, .* holds 27"),
        ({"token_type_ids": lambda x: x.roll(1, 1)}, "they must be the same"),
        ({"token_type_ids": lambda x: x[:1]}, r"token_type_ids has shape \(1, \d+\)"),
        ({"pixel_values": lambda x: x[:2]}, "the prompts hold 27 image tokens, and 2 images of 9 tokens make 18"),
        ({"pixel_values": lambda x: x[..., :40]}, r"this model takes \[images, 3, 48, 48\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Callable[[Tensor], Tensor]], message: str) -> None:
    inputs = made(traced()[0], 0, [[2], [1]]).inputs
    with pytest.raises(InputError, match=message):
        optimized()(**{**inputs, **{name: by(inputs[name]) for name, by in change.items()}})


@pytest.mark.slow
def test_on_onnx_runtime_the_answers_are_those_of_torch(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    mine = optimized("fastv{layer=1,keep=0.5}")
    exported = foveate.export(mine, backend="onnx", output=tmp_path / "package")
    assert exported.parity.ok and exported.parity.tokens
    there, inputs = foveate.load(tmp_path / "package"), made(traced()[0], 2, [[2], [0], [1]]).inputs
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    torch.testing.assert_close(there(**inputs).logits, mine(**inputs).logits, rtol=0, atol=1e-4)
    answers = mine.generate(**inputs, **options)
    assert torch.equal(there.generate(**inputs, **options), answers)
    arrays = {name: value.numpy() for name, value in inputs.items() if name != "token_type_ids"}
    assert (foveate.load(tmp_path / "package", tensors="np").generate(**arrays, **options) == answers.numpy()).all()


def with_config(part: str, **changes: Any) -> Any:
    source = gemma3("meta")
    for name, value in changes.items():
        setattr(getattr(source.config, part), name, value)
    return source


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_config("vision_config", model_type="clip"), "vision tower 'clip' is not supported in a Gemma 3"),
        (lambda: with_config("text_config", model_type="gemma2"), "decoder 'gemma2' is not supported in a Gemma 3"),
        (lambda: with_config("text_config", final_logit_softcapping=30.0), "final_logit_softcapping 30.0 is not supp"),
        (lambda: with_config("text_config", attn_logit_softcapping=50.0), "attn_logit_softcapping 50.0 is not suppor"),
        (lambda: with_config("text_config", use_bidirectional_attention=True), "use_bidirectional_attention True is"),
        (lambda: with_config("text_config", sliding_window=None), "with sliding_window None are not supported"),
        (
            lambda: with_config("text_config", layer_types=["chunked_attention"] * 3),
            "layers chunked_attention with sli",
        ),
        (lambda: with_config("vision_config", image_size=40), "5 x 5 patches cannot be averaged to 9 tokens"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        trace_program(make())


def test_the_embedding_is_scaled_as_transformers_scales_it_in_half_precision() -> None:
    """The square root is rounded to the weights' type first."""
    from foveate.prompts import embed

    source, program = gemma3().to(torch.bfloat16), traced()[2].copy()
    program.weights.put(program.info.paths["embed"], source.model.language_model.embed_tokens.weight)
    ids = torch.arange(2, 40)[None]
    assert torch.equal(embed(program, ids), source.model.language_model.embed_tokens(ids))
