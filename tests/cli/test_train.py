"""`foveate train`: what it makes, what it says, how it goes on after an interruption, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import foveate
from foveate.errors import InputError
from foveate.examples import Example
from foveate.models import digits
from foveate.train import Collator, Settings, check_lengths, finetune
from tests.cli.conftest import Run

PASSES = "drop-visual-heads{keep=2,from_layer=1}"
FEW = ("--steps", 4, "--batch", 2, "--lr", 0.01, "--save-every", 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six questions about images that lie in it, one without an image."""
    folder = tmp_path_factory.mktemp("data")
    lines: list[dict[str, Any]] = [{"prompt": "USER: read row 1 . ASSISTANT:", "answer": "empty"}]
    for number, sample in enumerate(digits.samples(split="train", task="mixed", n=5)):
        sample.image.save(folder / f"{number}.png")
        image: Any = f"{number}.png" if number else [f"{number}.png"]
        lines.append({"image": image, "prompt": sample.question, "answer": sample.answer})
    text = "\n\n".join(json.dumps(line) for line in lines)
    (folder / "train.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def saved(run: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pruned model that is trained."""
    target = tmp_path_factory.mktemp("saved") / "pruned"
    result = run("optimize", folder, "-p", PASSES, "-o", target)
    assert result.exit_code == 0, result.stderr
    return target


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(foveate.load(folder).weights.items())


@pytest.mark.slow
def test_a_saved_folder_is_trained_into_a_new_one(run: Run, saved: Path, data: Path, tmp_path: Path) -> None:
    result = run("train", saved, "--data", data, "-o", tmp_path / "out", *FEW, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["steps"], told["examples"], told["lora_rank"]) == (4, 6, 0)
    assert told["passes"] == [PASSES] and len(told["losses"]) == 4 and told["last_loss"] < told["first_loss"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"], "checkpoints are gone when the run is done"
    before, after = weights(saved), weights(tmp_path / "out")
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        n for n in before if ("language_model" in n and "rotary" not in n) or "lm_head" in n
    }
    assert run("run", tmp_path / "out", "--image", data / "1.png", "--prompt", "read row 1 .").exit_code == 0
    again = run("train", saved, "--data", data, "-o", tmp_path / "out", *FEW)
    assert again.exit_code == 2 and "exists already" in again.stderr


@pytest.mark.slow
def test_lora_is_merged_and_leaves_the_rest_alone(run: Run, folder: Path, data: Path, tmp_path: Path) -> None:
    result = run(
        "train", folder, "-p", PASSES, "--data", data / "train.jsonl", "-o", tmp_path / "out", *FEW, "--lora-rank", 2
    )
    assert result.exit_code == 0, result.stderr
    assert "4 steps in" in result.stdout and f"saved in {tmp_path / 'out'}" in result.stdout
    before = dict(foveate.optimize(digits_folder(folder), PASSES).weights.items())
    after = weights(tmp_path / "out")
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == {n for n in before if "language_model.layers" in n and n.endswith("proj.weight")}


def digits_folder(folder: Path) -> Any:
    from foveate.cli.models import load_model

    return load_model(str(folder)).model


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_end(
    run: Run, saved: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("train", saved, "--data", data, "-o", tmp_path / "whole", *FEW).exit_code == 0
    step = Trainer.training_step

    def stop(self: Any, *args: Any, **also: Any) -> Any:
        if self.state.global_step == last:
            raise KeyboardInterrupt
        return step(self, *args, **also)

    monkeypatch.setattr(Trainer, "training_step", stop)
    out = ("-o", tmp_path / "out", "--data", data)
    last = 1
    assert run("train", saved, *out, *FEW).exit_code == 130
    assert [p.name for p in tmp_path.iterdir()] == ["whole"], "there is nothing to resume yet"
    last = 3
    assert run("train", saved, *out, *FEW).exit_code == 130
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    refused = run("train", saved, *out, *FEW)
    assert refused.exit_code == 2 and "holds an interrupted run: add --resume" in refused.stderr
    other = run("train", saved, *out, *FEW, "--seed", 5, "--resume")
    assert other.exit_code == 2 and "was started with seed=0, not 5" in other.stderr
    resumed = run("train", saved, *out, *FEW, "--resume", "--json")
    assert resumed.exit_code == 0, resumed.stderr
    assert json.loads(resumed.stdout)["steps"] == 4
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(one[n], two[n]) for n in one)
    nothing = run("train", saved, "--data", data, "-o", tmp_path / "new", *FEW, "--resume")
    assert nothing.exit_code == 2 and "leave --resume out" in nothing.stderr


GOOD = {"prompt": "read row 1 .", "answer": "1 2 3 4"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: not JSON"),
        ("[1]", r'line 2: an object {"image", "prompt", "answer"} is expected'),
        (json.dumps({**GOOD, "anwser": "3"}), "line 2: unknown key 'anwser'"),
        (json.dumps({"prompt": "read row 1 ."}), "line 2: 'answer' is missing"),
        (json.dumps({**GOOD, "prompt": " "}), "line 2: 'prompt' is missing, or no text"),
        (json.dumps({**GOOD, "image": "gone.png"}), "line 2: there is no image"),
        (json.dumps({**GOOD, "image": 3}), "line 2: 'image' must be a path"),
        (json.dumps({**GOOD, "image": "train.jsonl"}), "train.jsonl is not an image that Pillow can read"),
        (json.dumps({**GOOD, "prompt": "<image> <image> ?", "image": "0.png"}), "line 2: the prompt holds 2 <image>"),
        (json.dumps({**GOOD, "answer": "1 " * 1100}), "line 2: prompt and answer are 1"),
    ],
)
def test_bad_data_is_named_by_its_line_before_anything_is_written(
    run: Run, saved: Path, tmp_path: Path, line: str, message: str
) -> None:
    digits.samples(n=1)[0].image.save(tmp_path / "0.png")
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(GOOD)}\n{line}\n", encoding="utf-8")
    result = run("train", saved, "--data", tmp_path, "-o", tmp_path / "out", *FEW)
    assert result.exit_code == 2 and message in result.stderr, result.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0.png", "train.jsonl"]


def test_data_that_is_not_there_is_named(run: Run, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_text("\n", encoding="utf-8")
    for name, message in (
        ("gone", "there is no such file or folder"),
        ("empty", "0 images and no .jsonl file"),
        ("empty.jsonl", "holds no samples"),
    ):
        result = run("train", saved, "--data", tmp_path / name, "-o", tmp_path / "out")
        assert result.exit_code == 2 and message in result.stderr, result.stderr
    result = run("train", saved, "-p", "fastv", "--data", "digits", "-o", tmp_path / "out")
    assert result.exit_code == 2 and "has its passes already; leave --passes out" in result.stderr


def test_labels_stand_on_the_answer_and_its_end_and_nowhere_else() -> None:
    _, processor = digits.load()
    drawn = digits.samples(split="train", task="mixed", n=3)
    batch = Collator(processor)([Example(s.prompt, (s.image,), s.answer) for s in drawn])
    for ids, labels, sample in zip(batch["input_ids"], batch["labels"], drawn, strict=True):
        places = (labels != -100).nonzero().squeeze(1)
        assert processor.decode(ids[places]) == f"{sample.answer} </s>"
        prompt = processor(images=sample.image, text=sample.prompt, return_tensors="pt")["input_ids"][0]
        assert torch.equal(ids[: places[0]][-len(prompt) :], prompt), "as it will be asked"
    alone = Collator(processor)([Example("USER: read row 1 . ASSISTANT:", answer="empty")])
    assert "pixel_values" not in alone or alone["pixel_values"] is None


def test_python_callers_get_the_same_errors(saved: Path, tmp_path: Path) -> None:
    opt = foveate.load(saved)
    _, processor = digits.load()
    with pytest.raises(InputError, match="no example to learn from"):
        finetune(opt, processor, [], Settings(), tmp_path)
    with pytest.raises(InputError, match="holds no checkpoint to resume from"):
        finetune(opt, processor, [Example("a", answer="b")], Settings(), tmp_path, resume=True)
    with pytest.raises(InputError, match=r"the sample 'row row .*': prompt and answer are \d+ tokens"):
        check_lengths(opt, Collator(processor), [Example("row " * 1020, answer="1 2 3 4")])


@pytest.mark.slow
def test_a_pruned_digits_recovers_in_a_short_run(run: Run, tmp_path: Path) -> None:
    options = ("--data", "digits", "--steps", 30, "--batch", 16, "--lr", 1e-3, "--json")
    result = run("train", "digits", "-p", "cut-visual{from_layer=3}", "-o", tmp_path / "out", *options)
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["last_loss"] < 0.85 * told["first_loss"]
    asked = ("--task", "row", "-n", 40, "--json")
    before = json.loads(run("eval", "digits", "-p", "cut-visual{from_layer=3}", *asked).stdout)
    after = json.loads(run("eval", tmp_path / "out", *asked).stdout)
    assert after["dense"] == before["dense"] and after["passes"] == "cut-visual{from_layer=3}"
    assert after["optimized"]["accuracy"] > before["optimized"]["accuracy"] + 0.1
    refused = run("eval", tmp_path / "out", "-p", "fastv")
    assert refused.exit_code == 2 and "leave --passes out" in refused.stderr
