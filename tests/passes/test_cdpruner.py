"""CDPruner: equal to CLIP's own modules and a greedy walk over determinants; questions, from text to the graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer

import foveate
from foveate.clip import questions_for
from foveate.errors import InputError, PassError
from foveate.models import digits
from foveate.models.random import random_inputs, random_llava
from foveate.passes import CDPruner, CutVisual, DivPrune, FastV, NeighborAttention
from tests.cli.conftest import Run, run  # noqa: F401  # a fixture
from tests.oracle import vision
from tests.oracle.masked import masked_forward, masked_greedy
from tests.oracle.masks import Masks, Neighbors, Prune
from tests.passes.check import _with_coords, check_pass, optimize
from tests.passes.test_vision import FEW

WORDS = ["what", "is", "this", "a", "cat", "?"]
SPACE = 12
"""Dimensions of the space that images and texts share."""


@pytest.fixture(scope="module")
def clip(gqa: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    """A CLIP of the tower's width, and its folder."""
    folder = tmp_path_factory.mktemp("clip")
    return made_for(gqa, folder), str(folder)


def made_for(model: Any, folder: Path) -> Any:
    """A CLIP of a model's tower, written to a folder; texts longer than eight tokens are cut."""
    text = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 10, "bos_token_id": 0, "eos_token_id": 1}
    text["projection_dim"] = SPACE
    tower = model.config.vision_config.to_dict()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = CLIPModel(CLIPConfig(text_config=text, vision_config=tower, projection_dim=SPACE)).eval()
        with torch.no_grad():
            for name, parameter in made.named_parameters():
                if "layernorm" not in name and "layer_norm" not in name:
                    parameter.normal_(0, 0.3)
            made.vision_model.post_layernorm.weight.normal_(1, 0.2)
            made.vision_model.post_layernorm.bias.normal_(0, 0.2)
    made.save_pretrained(folder)
    letters = sorted({letter for word in WORDS for letter in word})
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return made


def asked(images: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(images)
    return torch.nn.functional.normalize(torch.randn(images, SPACE, generator=draw), dim=-1)


def seen_by(keep: float, clip: Any = None, questions: Any = None, theta: float | None = None) -> Any:
    def tokens(source: Any, pixels: torch.Tensor) -> list[vision.Tokens]:
        return vision.cdpruner(source, vision.see(source, pixels), keep, clip, questions, theta)

    return tokens


def test_by_difference_alone(gqa: Any) -> None:
    check_pass(gqa, [CDPruner(0.4, clip="none")], Masks(), FEW, seen_by(0.4))


def test_by_difference_with_what_works_in_the_decoder(gqa: Any) -> None:
    one = CDPruner(0.6, clip="none")
    masks = Masks(neighbors=Neighbors((4, 4), 1), prunes=(Prune(2, 0.6, "fastv"),), cut_from=3)
    passes = [one, NeighborAttention(1), FastV(2, 0.6), CutVisual(3)]
    check_pass(gqa, passes, masks, FEW[:2], seen_by(0.6))


@pytest.mark.parametrize("theta", [None, 0.5])
@pytest.mark.parametrize("prompt", FEW, ids=str)
def test_by_the_question(gqa: Any, clip: Any, prompt: dict[str, Any], theta: float | None) -> None:
    """Logits, kept places and decoding, as the masked oracle has them on the tokens that CLIP's modules choose."""
    tower, folder = clip
    inputs = random_inputs(gqa, seed=3, **prompt)
    optimized = optimize(gqa, [CDPruner(0.4, clip=folder, theta=theta), FastV(2, 0.5), NeighborAttention(1)])
    masks = Masks(neighbors=Neighbors((4, 4), 1), prunes=(Prune(2, 0.5, "fastv"),))
    given, more = inputs, {}
    with torch.inference_mode():
        if "pixel_values" not in inputs:
            assert (optimized(**inputs).logits[:, 0] - masked_forward(gqa, inputs, masks).logits).abs().max() < 1e-4
            return
        more = {"questions": asked(len(inputs["pixel_values"]))}
        tokens = seen_by(0.4, tower, more["questions"], theta)(gqa, inputs["pixel_values"])
        given, places = (short := vision.shorten(gqa, inputs, tokens)).inputs, short.places
        masks = _with_coords(gqa, masks, inputs, places)
        with vision.showing(gqa, tokens):
            expected = masked_forward(gqa, given, masks).logits
            out = optimized(**inputs, **more)
            assert (out.logits[:, 0] - expected).abs().max() < 1e-4
            if prompt.get("padding") != "right":
                length = inputs["input_ids"].shape[1]
                options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
                found = optimized.generate(**inputs, **more, **options)[:, length:]
                assert torch.equal(found, masked_greedy(gqa, given, masks, 4))
    image = gqa.config.image_token_id
    for row, ids in enumerate(inputs["input_ids"]):
        wanted = [p for p in places[row] if p is not None and ids[p] == image]
        assert out.kept[0][row, : len(wanted)].tolist() == wanted


def test_another_question_keeps_other_tokens(gqa: Any, clip: Any) -> None:
    inputs, optimized = random_inputs(gqa, seed=3), optimize(gqa, [CDPruner(0.4, clip=clip[1], theta=0.8)])
    with torch.inference_mode():
        one, other = (optimized(**inputs, questions=q).kept[0] for q in (asked(1), -asked(1)))
    assert not torch.equal(one, other)


def test_beams_keep_their_questions(gqa: Any, clip: Any) -> None:
    inputs = random_inputs(gqa, batch=3, images_per_row=[2, 0, 1], padding="left")
    optimized = optimize(gqa, [CDPruner(0.4, clip=clip[1])])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 2}
    together = optimized.generate(**inputs, questions=asked(3), **options)
    pixels, questions, start = inputs["pixel_values"], asked(3), 0
    for row, count in enumerate((2, 0, 1)):
        part = slice(start, start := start + count)
        alone = {name: inputs[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        if count:
            alone |= {"pixel_values": pixels[part], "questions": questions[part]}
        assert torch.equal(optimized.generate(**alone, **options)[0], together[row])


def test_a_saved_program_needs_no_clip(gqa: Any, clip: Any, tmp_path: Path) -> None:
    inputs = random_inputs(gqa, seed=3)
    optimized = optimize(gqa, [CDPruner(0.4, clip=clip[1])])
    optimized.save_pretrained(tmp_path / "x")
    with torch.inference_mode():
        expected = optimized(**inputs, questions=asked(1)).logits
        assert torch.equal(foveate.load(tmp_path / "x")(**inputs, questions=asked(1)).logits, expected)
    labels = torch.where(inputs["input_ids"] == gqa.config.image_token_id, -100, inputs["input_ids"])
    assert optimized(**inputs, labels=labels, questions=asked(1)).loss.isfinite()


def test_a_model_is_given_what_its_pass_asks_for(gqa: Any, clip: Any, tmp_path: Path) -> None:
    texts = ["what is this ?", "a cat"]
    found = questions_for(optimize(gqa, [CDPruner(0.4, clip=clip[1])]), texts)
    assert torch.equal(found["questions"], foveate.questions(clip[1], texts))
    for other in (gqa, optimize(gqa, [CDPruner(0.4, clip="none")]), optimize(gqa, [FastV(2, 0.5)])):
        assert questions_for(other, texts) == {}
    made_for(gqa, tmp_path / "moved")
    optimized = optimize(gqa, [CDPruner(0.4, clip=str(tmp_path / "moved"))])
    (tmp_path / "moved").rename(tmp_path / "away")
    assert questions_for(optimized, []) == {}
    with pytest.raises(InputError, match="moved is no folder; give a local CLIP"):
        questions_for(optimized, texts)


@pytest.mark.slow
def test_commands_give_the_question(run: Run, tmp_path: Path) -> None:  # noqa: F811
    made_for(digits.load()[0], tmp_path / "clip")
    passes = f"cdpruner{{keep=0.3,clip={tmp_path / 'clip'},theta=0.9}}"
    asked = digits.samples(task="lookup", n=2, seed=5)
    asked[0].image.save(tmp_path / "x.png")
    kept = []
    for question in ("what is this ?", "a a a a a a"):
        told = run("run", "digits", "-p", passes, "--image", tmp_path / "x.png", "--prompt", question, "--json")
        assert told.exit_code == 0, told.stderr
        kept.append(json.loads(told.stdout)["kept"]["0"])
    assert len(kept[0]) == len(kept[1]) == 43
    assert kept[0] != kept[1]
    told = run("eval", "digits", "-p", passes, "-n", 2, "--json")
    assert told.exit_code == 0, told.stderr
    assert json.loads(told.stdout)["optimized"]["n"] == 2


def test_questions_are_clip_s_own(clip: Any) -> None:
    folder = clip[1]
    tower = CLIPTextModelWithProjection.from_pretrained(folder).eval()
    texts = ["what is this?", "a cat", "this is what a cat is", ""]
    found = foveate.questions(folder, texts)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    for text, vector in zip(texts, found, strict=True):
        ids = tokenizer(text)["input_ids"][1:-1]
        segments = [ids[start : start + 8] for start in range(0, len(ids), 8)] or [[]]
        units = []
        for segment in segments:
            with torch.no_grad():
                (out,) = tower(input_ids=torch.tensor([[0, *segment, 1]])).text_embeds
                units.append(torch.nn.functional.normalize(out, dim=-1))
        torch.testing.assert_close(vector, torch.stack(units).mean(0), rtol=1e-5, atol=1e-6)
    assert found.shape == (4, SPACE) and foveate.questions(folder, []).shape == (0, SPACE)
    with pytest.raises(InputError, match="is no folder; give a local CLIP"):
        foveate.questions("openai/clip-vit-large-patch14-336", texts)


def test_questions_that_do_not_fit_are_refused(gqa: Any, clip: Any) -> None:
    inputs, optimized = random_inputs(gqa), optimize(gqa, [CDPruner(0.4, clip=clip[1])])
    for given, message in ((None, "there is none"), (asked(2), r"there is \[2, 12\]")):
        with pytest.raises(InputError, match=message):
            optimized(**inputs, questions=given)
    with pytest.raises(InputError, match="leave questions out"):
        optimize(gqa, "divprune")(**inputs, questions=asked(1))


def test_bad_options_are_refused(mha: Any, clip: Any, tmp_path: Path) -> None:
    folder = clip[1]
    (tmp_path / "config.json").write_text("[]")
    narrow = random_llava(layers=2, vision_hidden=16)
    for model, one, message in (
        (mha, "cdpruner", "the folder of a CLIP, or none"),
        (mha, "cdpruner{clip=none,theta=0.5}", "theta has no meaning with clip=none"),
        (mha, f"cdpruner{{clip={folder},theta=1}}", "0 to below 1"),
        (mha, f"cdpruner{{clip={tmp_path}}}", "is no folder of a CLIP"),
        (mha, "cdpruner{clip=gone}", "gone is no folder of a CLIP"),
        (mha, "divprune,cdpruner{clip=none}", "put cdpruner before that"),
        (narrow, f"cdpruner{{clip={folder}}}", "this tower has 16"),
    ):
        with pytest.raises(PassError) as error:
            optimize(model, one)
        assert message in str(error.value)


def test_before_another_selection(gqa: Any) -> None:
    def both(model: Any, pixels: torch.Tensor) -> list[vision.Tokens]:
        return vision.divprune(model, seen_by(0.75)(model, pixels), 0.5)

    check_pass(gqa, [CDPruner(0.75, clip="none"), DivPrune(0.5)], Masks(), FEW[:2], both)


@pytest.mark.slow
def test_forecasts_need_no_weights(clip: Any) -> None:
    folder = clip[1]
    weightless = random_llava(layers=2, device="meta")
    program = foveate.optimize(weightless, f"cdpruner{{keep=0.5,clip={folder}}}").program
    assert foveate.cost(program).vision.flops > foveate.cost(foveate.trace(weightless)).vision.flops
