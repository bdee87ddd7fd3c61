"""`foveate optimize` and `foveate run`, from a model's folder to an answer, and what stops them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import foveate
from foveate.cli.models import load_model
from foveate.cli.prompts import full_prompt
from foveate.model import OptimizedModel
from foveate.models.digits import prompt_for
from foveate.ops import PAD
from tests.cli.conftest import Run, said_in

QUESTION = "which digit is at row 1 , column 2 ?"


def ask(run: Run, model: Path, images: Sequence[Path], prompt: str = QUESTION, *options: object) -> Any:
    shown = [part for image in images for part in ("--image", image)]
    return run("run", model, *shown, "--prompt", prompt, "--max-new-tokens", 4, *options)


@pytest.mark.slow
def test_a_saved_model_answers_as_the_model_does(run: Run, folder: Path, saved: Path, image: Path) -> None:
    result = ask(run, saved, [image], QUESTION, "--json")
    told = json.loads(result.stdout)
    loaded = load_model(str(folder))
    processor = loaded.get_processor()
    opt = foveate.optimize(loaded.model, "fastv{layer=1,keep=0.5}")
    inputs = processor(text=[prompt_for(QUESTION)], images=[Image.open(image)], return_tensors="pt")
    ids = opt.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert told["answer"] == processor.decode(ids, skip_special_tokens=True).strip()
    assert told["new_tokens"] == len(ids)
    assert told["prompt"] == prompt_for(QUESTION)
    kept = opt(**inputs).kept[1][0]
    assert told["kept"] == {"1": kept[kept != PAD].tolist()}
    assert len(told["kept"]["1"]) == 72
    assert told["passes"] == ["fastv{layer=1}"]


def test_for_people_the_answer_is_all_of_stdout(run: Run, saved: Path, image: Path) -> None:
    told = json.loads(ask(run, saved, [image], QUESTION, "--json").stdout)
    result = ask(run, saved, [image])
    assert result.stdout == told["answer"] + "\n"
    assert "before layer 1: 72 of 144 visual tokens stay" in result.stderr


@pytest.mark.slow
def test_the_curve_of_an_image_is_drawn(run: Run, folder: Path, saved: Path, image: Path, tmp_path: Path) -> None:
    curve = tmp_path / "curve.png"
    told = ask(run, folder, [image], QUESTION, "-p", "cls-curve{layer=0}", "--curve", curve, "--json")
    (shown,) = json.loads(told.stdout)["curves"]
    assert len(shown["likeness"]) == 144 and 1 <= shown["turn"] <= shown["kept"] <= 144
    with Image.open(curve) as picture:
        assert picture.format == "PNG"
    for model, images, message in ((saved, [image], "hold no cls-curve"), (saved, [], "give one with --image")):
        result = ask(run, model, images, "where ?", "--curve", tmp_path / "none.png")
        assert result.exit_code == 2 and message in result.stderr
        assert not (tmp_path / "none.png").exists()


@pytest.mark.slow
def test_a_model_with_passes_and_without(run: Run, folder: Path, image: Path) -> None:
    passes = ("--passes", "cut-visual{from_layer=1}")
    cut = json.loads(ask(run, folder, [image], QUESTION, *passes, "--json").stdout)
    assert cut["passes"] == ["cut-visual{from_layer=1}"]
    assert cut["kept"] is None
    dense = json.loads(ask(run, folder, [image], QUESTION, "--json").stdout)
    assert dense["passes"] == []


def test_several_images_and_text_alone(run: Run, saved: Path, image: Path) -> None:
    two = json.loads(ask(run, saved, [image, image], "USER: <image> <image> 3 ASSISTANT:", "--json").stdout)
    assert two["visual_tokens"] == 288
    by_template = json.loads(ask(run, saved, [image, image], "3", "--json").stdout)
    assert by_template["prompt"].count("<image>") == 2
    alone = json.loads(ask(run, saved, [], "how many ?", "--json").stdout)
    assert alone["visual_tokens"] == 0


@pytest.mark.slow
def test_kept_patches_are_drawn_by_image_and_layer(run: Run, folder: Path, image: Path, tmp_path: Path) -> None:
    drawn, one = tmp_path / "kept.png", tmp_path / "one.png"
    passes = "divprune{keep=0.5},fastv{layer=1,keep=0.5}"
    result = ask(run, folder, [image, image], QUESTION, "--passes", passes, "--kept", drawn, "--json")
    kept = json.loads(result.stdout)["kept"]
    assert {layer: len(places) for layer, places in kept.items()} == {"0": 144, "1": 72}
    assert ask(run, folder, [image], QUESTION, "--passes", "divprune{keep=0.5}", "--kept", one).exit_code == 0
    width, height = Image.open(one).size
    sheet = Image.open(drawn).convert("RGB")
    assert sheet.size == (2 * width, 2 * height)
    # Both images are the same, and so is what divprune leaves of them; what fastv leaves is less.
    boxes = [(column * width, row * height) for row in (0, 1) for column in (0, 1)]
    panels = [sheet.crop((x, y, x + width, y + height - 40)).tobytes() for x, y in boxes]
    assert panels[0] == panels[2] != panels[1]


@pytest.mark.parametrize("images", [0, 1])
def test_nothing_to_draw_is_an_error(run: Run, folder: Path, image: Path, tmp_path: Path, images: int) -> None:
    drawn = tmp_path / "kept.png"
    passes = "cut-visual{from_layer=1}" if images else "divprune{keep=0.5}"
    result = ask(run, folder, [image] * images, QUESTION, "--passes", passes, "--kept", drawn)
    assert result.exit_code == 2
    assert "--kept draws what a selection keeps" in result.stderr
    assert not drawn.exists()


def test_a_question_is_wrapped_as_the_model_was_trained(folder: Path) -> None:
    processor = load_model(str(folder)).get_processor()
    assert full_prompt(processor, QUESTION, 1) == prompt_for(QUESTION)
    assert full_prompt(processor, prompt_for(QUESTION), 1) == prompt_for(QUESTION)


def test_no_chat_template(run: Run, folder: Path, image: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "chat_template.jinja").unlink()
    result = ask(run, copy, [image])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no chat template" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("missing.png", None, "there is no image"),
        ("text.png", b"no image", "text.png is not an image that Pillow can read"),
        ("empty.png", b"", "is not an image"),
        ("folder.png", "folder", "is a folder"),
    ],
)
def test_an_image_that_is_none(
    run: Run, folder: Path, tmp_path: Path, name: str, content: bytes | str | None, said: str
) -> None:
    path = tmp_path / name
    if content == "folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    result = ask(run, folder, [path])
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr
    assert len(said_in(result)) == 1


def test_a_truncated_image(run: Run, folder: Path, image: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.png"
    half.write_bytes(image.read_bytes()[:2000])
    assert "half.png is not an image that Pillow can read" in ask(run, folder, [half]).stderr


@pytest.mark.parametrize(("marks", "images"), [(2, 1), (1, 0), (1, 2)])
def test_an_image_count_that_does_not_fit(run: Run, folder: Path, image: Path, marks: int, images: int) -> None:
    result = ask(run, folder, [image] * images, "<image> " * marks + "3")
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"the prompt holds {marks} <image> and {images} image" in result.stderr


def test_a_prompt_that_is_too_long(run: Run, folder: Path, image: Path) -> None:
    result = ask(run, folder, [image], "3 " * 1000)
    assert result.exit_code == 2
    assert "this model takes 1024 in all" in result.stderr


def test_passes_for_a_saved_model_are_refused(run: Run, saved: Path, image: Path) -> None:
    result = ask(run, saved, [image], QUESTION, "--passes", "fastv")
    assert result.exit_code == 2
    assert "optimized already" in result.stderr
    result = run("bench", saved, "--passes", "fastv")
    assert result.exit_code == 2
    assert "optimized already" in result.stderr


def test_what_is_saved_loads_again(saved: Path) -> None:
    opt = foveate.load(saved)
    assert isinstance(opt, OptimizedModel)
    assert [record.text for record in opt.program.passes] == ["fastv{layer=1}"]
    assert not list(saved.parent.glob(".*")), "a part of the work is left beside the folder"


@pytest.mark.slow
def test_optimize_tells_what_the_passes_did(run: Run, folder: Path, tmp_path: Path) -> None:
    result = run("optimize", folder, "-p", "cut-visual{from_layer=1}", "-o", tmp_path / "a", "--json")
    told = json.loads(result.stdout)
    (record,) = told["report"]["passes"]
    assert record["text"] == "cut-visual{from_layer=1}"
    assert record["skipped"] is None
    assert told["processor"]
    shown = run("optimize", folder, "-p", "cut-visual{from_layer=1}", "-o", tmp_path / "b")
    assert "1. cut-visual{from_layer=1}" in shown.stdout
    assert f"saved in {tmp_path / 'b'}" in shown.stdout


def test_a_pass_that_changes_nothing_is_told(run: Run, folder: Path, tmp_path: Path) -> None:
    result = run("optimize", folder, "-p", "cut-visual{from_layer=2}", "-o", tmp_path / "out")
    assert result.exit_code == 0
    assert "warning: cut-visual{from_layer=2} changed nothing" in result.stderr
    assert "changed nothing" in result.stdout


def test_a_model_without_processor_is_saved_with_a_note(run: Run, tmp_path: Path) -> None:
    sizes = ("--layers", 2, "--hidden", 32, "--heads", 2, "--ffn", 32, "--visual-tokens", 16)
    result = run("optimize", "random:llava", *sizes, "-p", "cut-visual{from_layer=1}", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert "no processor is saved" in result.stderr
    assert foveate.load(tmp_path / "out").program.info.layers == 2
    asked = ask(run, tmp_path / "out", [], "x")
    assert asked.exit_code == 2
    assert "no processor" in asked.stderr


def test_an_output_folder_that_exists(run: Run, folder: Path, tmp_path: Path) -> None:
    result = run("optimize", folder, "-p", "fastv{layer=1}", "-o", tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"error: output folder {tmp_path} exists already; give a new one, or remove it\n"
    result = run("optimize", folder, "-p", "fastv{layer=1}", "-o", tmp_path / "no" / "out")
    assert "there is no folder" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_failure_leaves_nothing_behind(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: OptimizedModel, target: Path) -> None:
        Path(target).mkdir()
        (Path(target) / "foveate.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(OptimizedModel, "save_pretrained", half)
    result = run("optimize", folder, "-p", "fastv{layer=1}", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_pass_that_does_not_fit(run: Run, folder: Path, tmp_path: Path) -> None:
    result = run("optimize", folder, "-p", "fastv{layer=7}", "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "it has 2 layers" in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_random_state_is_the_user_s(run: Run, folder: Path, image: Path) -> None:
    before = torch.get_rng_state()
    ask(run, folder, [image])
    assert torch.equal(before, torch.get_rng_state())
