"""Training modules: loss and gradients are the oracle's, fixed decisions are inference, and only modules are saved."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

import foveate
from foveate.cli.main import cli
from foveate.errors import InputError, PassError
from foveate.examples import Example
from foveate.ir.modules import Modules
from foveate.learn import Learner, learn_modules, learner
from foveate.models.random import random_inputs, random_llava
from foveate.ops import PAD
from foveate.passes import DynamicViT, LVPruning, SmartTrim, parse_pipeline
from foveate.train import Settings, _module_weights
from tests.oracle.learned import learned_logits, ratio_loss, with_weights
from tests.passes.test_learned import HIDDEN, ORACLES
from tests.passes.test_training import answered
from tests.small_digits import small_digits

PROMPTS: tuple[dict[str, Any], ...] = (
    {"batch": 2},
    {"batch": 3, "images_per_row": [2, 0, 1], "padding": "left", "text_tokens": 14},
    {"batch": 2, "padding": "right"},
    {"batch": 2, "images": 0},
)
SELECTIONS = [LVPruning(layers=(1, 3), ratio=0.6, step=0.35), DynamicViT((1, 3)), SmartTrim((1, 3))]


@cache
def traced(kv_heads: int) -> tuple[Any, Any]:
    model = random_llava(layers=4, kv_heads=kv_heads)
    return model, foveate.trace(model)


def fresh(selection: Any, kv_heads: int = 2, others: str = "", **settings: Any) -> tuple[Any, Learner]:
    model, program = traced(kv_heads)
    passes = [*parse_pipeline(others), selection]
    made = learner(model, passes, Settings(part="modules", **settings), traced=program)
    generator = torch.Generator().manual_seed(1)
    for name in made.own:
        value = made.weights.get(name)
        if value.dim() == 1:
            value.data += 0.3 * torch.randn(value.shape, generator=generator)
    return model, made


def fixed(made: Learner, noise: dict[int, Tensor]) -> None:
    """Let decisions be drawn by this noise."""
    made.noise = lambda layer, shape, device: noise[layer][:, : shape[1]]  # type: ignore[method-assign]


def oracles(made: Learner) -> dict[int, Any]:
    tensors = made.modules_now().tensors
    return {layer: with_weights(ORACLES[made.selection.name](HIDDEN), tensors, layer) for layer in made.stages}


def drawn(made: Learner, batch: int, seed: int = 0) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {layer: 2 * torch.randn(batch, 64, generator=generator) for layer in made.stages}


@pytest.mark.slow
@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda s: s.name)
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("loss", ["mse", "huber"])
def test_loss_and_gradients_are_those_of_explicit_masks(selection: Any, kv_heads: int, loss: Any) -> None:
    model, made = fresh(selection, kv_heads, ratio_loss=loss, ratio_weight=3.0, distill=0.7)
    modules = oracles(made)
    shares = selection.shares(2)
    for seed, prompt in enumerate(PROMPTS):
        inputs = random_inputs(model, seed=seed, **prompt)
        labels = answered(inputs)
        noise = drawn(made, len(labels), seed)
        fixed(made, noise)
        out = made(**inputs, labels=labels)
        logits, run = learned_logits(model, inputs, labels, modules, noise)
        following = labels[:, 1:].flatten()
        answer = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), following)
        with torch.no_grad():
            taught, _ = learned_logits(model, inputs, labels, {}, {})
        ours, theirs = (x[:, :-1].flatten(0, 1)[following != -100].log_softmax(1) for x in (logits, taught))
        divergence = (theirs.exp() * (theirs - ours)).sum(1).mean()
        expected = answer + 3 * ratio_loss(run, shares, loss == "huber") + 0.7 * divergence
        assert abs(out.loss.item() - expected.item()) < 1e-4, prompt
        names = made.own
        ours_grad = torch.autograd.grad(out.loss, [made.weights.get(n) for n in names], allow_unused=True)
        parameters = {
            f"{made.selection.name}.{layer}.{n}": p for layer, m in modules.items() for n, p in m.named_parameters()
        }
        assert set(parameters) == set(names)
        if expected.requires_grad:
            wanted = torch.autograd.grad(expected, [parameters[n] for n in names], allow_unused=True)
            some = 0.0
            for name, a, b in zip(names, ours_grad, wanted, strict=True):
                if a is None or b is None:
                    assert all(x is None or not x.any() for x in (a, b)), name
                    continue
                torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-5, msg=name)
                some += float(b.abs().sum())
            assert some > 0 or prompt.get("images") == 0


OTHERS = "drop-visual-heads{keep=2,from_layer=1},drop-visual-neurons{keep=0.5},cut-visual{from_layer=3}"
BEHIND = [*((s, "") for s in SELECTIONS), (LVPruning(layers=(0, 2), ratio=0.6, step=0.35), OTHERS)]


@pytest.mark.parametrize(("selection", "others"), BEHIND, ids=lambda x: getattr(x, "name", "others" if x else "alone"))
def test_with_the_decisions_of_inference_the_training_form_is_inference(selection: Any, others: str) -> None:
    model, made = fresh(selection, others=others, distill=0.0)
    for prompt in PROMPTS[:3]:
        inputs = random_inputs(model, seed=7, **prompt)
        labels = torch.full_like(inputs["input_ids"], -100)
        for row, attended in enumerate(inputs["attention_mask"]):
            labels[row, attended.nonzero()[-1]] = 5
        shorter = {**inputs, "attention_mask": inputs["attention_mask"] * (labels == -100)}
        with torch.inference_mode():
            pruned = made(**shorter)
        visual = inputs["input_ids"] == model.config.image_token_id
        places = [row.nonzero()[:, 0].tolist() for row in visual]
        noise = {}
        for layer in made.stages:
            chosen = torch.full((len(places), 64), -1e4)
            for row, kept in enumerate(pruned.kept[layer].tolist()):
                for place in kept:
                    if place != PAD:
                        chosen[row, places[row].index(place)] = 1e4
            noise[layer] = chosen
        fixed(made, noise)
        with torch.inference_mode():
            masked = made(**inputs, labels=labels)
        torch.testing.assert_close(masked.logits[:, 0], pruned.logits[:, 0], rtol=0, atol=1e-4)


def test_modules_do_not_see_the_answer() -> None:
    model, made = fresh(SELECTIONS[0])
    inputs = random_inputs(model, batch=2, seed=1)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    fixed(made, drawn(made, 2))
    found = []
    for change in (0, 1):
        ids = inputs["input_ids"].clone()
        ids[:, -3:] = (ids[:, -3:] + change) % 100 + 2
        made.terms = {}
        made(**{**inputs, "input_ids": ids}, labels=labels)
        found.append(made.terms["ratio"])
    assert found[0] == found[1]


def test_the_model_is_frozen_and_its_own_stays_trainable() -> None:
    model, made = fresh(SELECTIONS[0])
    assert all(p.requires_grad for p in model.parameters())
    learning = {name for name, p in made.named_parameters() if p.requires_grad}
    assert learning == {f"weights.{name}" for name in made.own}
    own = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in own for p in made.parameters() if not p.requires_grad), "no copy of the model"
    inputs = random_inputs(model, batch=2)
    made(**inputs, labels=answered(inputs)).loss.backward()
    assert all(p.grad is None for p in model.parameters())


def test_accumulated_batches_count_the_ratio_once() -> None:
    model, made = fresh(SELECTIONS[0], accumulate=2)
    inputs = random_inputs(model, batch=2)
    labels = answered(inputs)
    fixed(made, drawn(made, 2))
    whole = made(**inputs, labels=labels).loss
    items = int((labels[:, 1:] != -100).sum())
    twice = [made(**inputs, labels=labels, num_items_in_batch=2 * items).loss for _ in range(2)]
    torch.testing.assert_close(sum(twice), whole)
    assert set(made.mean_terms()) == {"answer_loss", "ratio_loss"} and made.mean_terms() == {}


def questions(count: int) -> list[Example]:
    from foveate.models import digits

    return [Example(s.prompt, (s.image,), s.answer) for s in digits.samples(split="train", task="mixed", n=count)]


DIGITS = "lvpruning{layers=[1],ratio=0.5}"
FEW = Settings(steps=4, batch=2, rate=1e-2, part="modules", save_every=2)


@pytest.mark.slow
def test_a_run_is_logged_in_terms_and_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    from transformers import Trainer

    model, processor = small_digits()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn_questions = questions(8)
    made = learner(model, DIGITS, FEW)
    started = made.modules_now()
    modules, result = learn_modules(made, processor, drawn_questions, made_folder(tmp_path / "one"))
    assert result.steps == 4 and result.parameters == sum(x.numel() for x in modules.tensors.values())
    assert set(result.terms[0][1]) == {"answer_loss", "ratio_loss"}
    for (_, loss), (_, terms) in zip(result.losses, result.terms, strict=True):
        assert abs(loss - sum(terms.values())) < 2e-3
    assert all(not torch.equal(started.tensors[n], modules.tensors[n]) for n in modules.tensors if "head" in n)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    checkpoint = tmp_path / "one" / "checkpoint-4" / "model.safetensors"
    assert checkpoint.stat().st_size < 4 * result.parameters + 10_000, "of the model nothing is saved"

    step = Trainer.training_step

    def stop(self: Any, *args: Any, **also: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return step(self, *args, **also)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "training_step", stop)
        learn_modules(learner(model, DIGITS, FEW), processor, drawn_questions, made_folder(tmp_path / "two"))
    again, told = learn_modules(learner(model, DIGITS, FEW), processor, drawn_questions, tmp_path / "two", resume=True)
    assert told.steps == 4 and all(torch.equal(modules.tensors[n], again.tensors[n]) for n in modules.tensors)

    again.save(tmp_path / "m.safetensors")
    assert Modules.load(tmp_path / "m.safetensors").trained["steps"] == 4
    opt = foveate.optimize(model, f"lvpruning{{layers=[1],ratio=0.25,modules={tmp_path / 'm.safetensors'}}}")
    inputs = processor(images=drawn_questions[0].images[0], text=drawn_questions[0].prompt, return_tensors="pt")
    assert opt(**inputs).kept[1].shape[1] == 36


@pytest.mark.slow
def test_the_command_makes_a_file_that_the_pass_takes(tmp_path: Path) -> None:
    def run(*args: object) -> Any:
        return CliRunner().invoke(cli, [str(arg) for arg in args])

    few = ("--data", "digits", "--steps", 2, "--batch", 2)
    out = tmp_path / "m.safetensors"
    passes = "lvpruning{layers=[1],ratio=0.5}"
    result = run("train", "digits", "-p", passes, "--part", "modules", *few, "-o", out, "--json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["passes"] == [passes.replace(",ratio=0.5", "")] and told["steps"] == 2
    assert set(told["terms"][0]) == {"step", "answer_loss", "ratio_loss"}
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"], "checkpoints are gone when the run is done"
    asked = run("eval", "digits", "-p", f"lvpruning{{layers=[1],modules={out}}}", "-n", 2, "--json")
    assert asked.exit_code == 0 and json.loads(asked.stdout)["optimized"]["n"] == 2
    for options, message in (
        (("-p", passes, "-o", out), "exists already"),
        (("-p", passes, "-o", tmp_path / "folder"), "must end in .safetensors"),
        (("-p", passes, "-o", tmp_path / "n.safetensors", "--lora-rank", 2), "leave it out with --part modules"),
        (("-p", "fastv", "-o", tmp_path / "n.safetensors"), "takes passes of which the last"),
    ):
        refused = run("train", "digits", "--part", "modules", *few, *options)
        assert refused.exit_code == 2 and message in refused.stderr, refused.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def made_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.slow
def test_what_cannot_be_trained_is_refused_before_it_begins(tmp_path: Path) -> None:
    model, processor = small_digits()
    for passes, message in (
        ("fastv{layer=1}", "takes passes of which the last, and no other, has modules"),
        ("", "takes passes of which the last"),
        ("lvpruning{layers=[1]},fastv{layer=1}", "takes passes of which the last"),
        ("lvpruning{layers=[1],ratio=1.0}", "removes nothing"),
        ("lvpruning", "layer 16 is not one of this model's 2"),
        ("random-prune{layer=0},lvpruning{layers=[1]}", "behind another selection in the decoder"),
    ):
        with pytest.raises(PassError, match=message):
            learner(model, passes, FEW)
    deeper, program = traced(2)
    with pytest.raises(PassError, match="cannot be trained beside neighbor-attention"):
        learner(deeper, "neighbor-attention{radius=1},lvpruning{layers=[1]}", FEW, traced=program)
    made = learner(model, DIGITS, FEW)
    with pytest.raises(InputError, match="no example to learn from"):
        learn_modules(made, processor, [], tmp_path)
    with pytest.raises(InputError, match="none of the first 256 examples has an image"):
        learn_modules(made, processor, [Example("a", answer="b")] * 3, tmp_path)
    with pytest.raises(InputError, match="holds no checkpoint to resume from"):
        learn_modules(made, processor, questions(1), tmp_path, resume=True)


@pytest.mark.slow
def test_modules_of_a_saved_model_do_not_learn_when_the_model_does(tmp_path: Path) -> None:
    _, made = fresh(SELECTIONS[0])
    made.modules_now().save(tmp_path / "m")
    model, program = traced(2)
    passes = f"lvpruning{{layers=[1, 3],ratio=0.6,step=0.35,modules={tmp_path / 'm'}}}"
    foveate.optimize(model, passes, traced=program).save_pretrained(tmp_path / "saved")
    saved = foveate.load(tmp_path / "saved")
    frozen = {id(weight) for weight in _module_weights(saved)}
    assert frozen == {id(saved.weights.get(name)) for name in made.own}


@pytest.mark.slow
def test_training_goes_on_from_a_file(tmp_path: Path) -> None:
    model, made = fresh(SELECTIONS[0])
    made.modules_now({"steps": 3}).save(tmp_path / "m")
    again = learner(model, f"lvpruning{{layers=[1, 3],ratio=0.6,step=0.35,modules={tmp_path / 'm'}}}", Settings())
    assert all(torch.equal(made.weights.get(n), again.weights.get(n)) for n in made.own)
    assert json.dumps(Modules.load(tmp_path / "m").trained) == '{"steps": 3}'
