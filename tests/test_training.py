"""An optimized model trains as an ordinary module: by hand, under `transformers.Trainer`, and with peft's LoRA."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import foveate
from foveate import artifact
from foveate.errors import ArtifactError, BackendError, UnsupportedModelError
from foveate.ir.program import Program
from foveate.models.random import random_inputs, random_llava

PASSES = "drop-visual-heads{keep=2,from_layer=1},drop-visual-neurons{keep=0.5},fastv{layer=1,keep=0.5}"


@cache
def traced() -> tuple[Any, Program]:
    model = random_llava(layers=2, heads=4, kv_heads=2)
    return model, foveate.trace(model)


def fresh(passes: str = PASSES, **options: Any) -> Any:
    """An optimized model with weights of its own, always the same."""
    model, program = traced()
    own = program.copy()
    for name, value in program.weights.items():
        own.weights.put(name, nn.Parameter(value.detach().clone()) if value.requires_grad else value.clone())
    return foveate.optimize(model, passes, traced=own, **options)


def examples(count: int, answer: int = 3) -> list[dict[str, Tensor]]:
    """Prompts as a dataset holds them, with labels on their last tokens."""
    model, _ = traced()
    made = []
    for seed in range(count):
        inputs = {name: value[0] for name, value in random_inputs(model, seed=seed).items()}
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[-answer:] = inputs["input_ids"][-answer:]
        made.append({**inputs, "labels": labels})
    return made


def batch(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def arguments(folder: Path, steps: int = 4, **options: Any) -> TrainingArguments:
    settings = {"per_device_train_batch_size": 2, "save_steps": 2, "learning_rate": 1e-3, "seed": 1, **options}
    return TrainingArguments(
        str(folder), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1, **settings
    )


def lora(**options: Any) -> peft.LoraConfig:
    settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    return peft.LoraConfig(**settings)


def furthest(one: Any, other: Any) -> float:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return max((a - b).abs().max().item() for (name, a), (same, b) in pairs if name == same)


@pytest.mark.slow
def test_parameters_are_what_the_graphs_read_and_the_original_models_own_unless_reordered() -> None:
    model = random_llava(layers=2, heads=4, kv_heads=2)
    opt = foveate.optimize(model, "drop-visual-heads{mask=[[1,1,1,1],[0,1,0,1]],from_layer=1}")
    own = {id(p) for p in model.parameters()}
    copies = [name for name, p in opt.named_parameters() if id(p) not in own]
    assert copies and all(".layers.1.self_attn." in name for name in copies)
    opt.train()
    opt(**batch(examples(2))).loss.backward()
    assert all(p.grad is not None for p in opt.parameters()), "unused parameters would stop distributed training"
    assert opt.training and not opt.eval().training


@pytest.mark.slow
def test_a_few_steps_by_hand_lower_the_loss() -> None:
    opt, data = fresh(), batch(examples(4))
    optimizer = torch.optim.AdamW(opt.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = opt(**data).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
    with torch.inference_mode():
        assert abs(opt(**data).loss.item() - losses[-1]) < losses[-1], "decoding graphs see the same weights"


def test_what_is_returned_with_labels() -> None:
    opt, data = fresh(), batch(examples(3))
    data["labels"][0, -3:] = torch.tensor([-100, 7, -100])
    out = opt(**data)
    assert out.logits.shape[:2] == out.labels.shape == (3, 3)
    assert out.labels[0].tolist() == [7, -100, -100]
    assert out.past_key_values is None and set(out.kept) == {1}
    mean = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), out.labels.flatten())
    assert torch.allclose(out.loss, mean)


@pytest.mark.slow
def test_the_trainer_saves_what_loads_and_resumes_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    whole, stopped, data = fresh(), fresh(), examples(16)
    options = {"gradient_accumulation_steps": 2}
    trainer = Trainer(whole, arguments(tmp_path / "a", **options), train_dataset=data, eval_dataset=data[:4])
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    Trainer(stopped, arguments(tmp_path / "b", **options), train_dataset=data).train(resume_from_checkpoint=True)
    assert furthest(whole, stopped) == 0
    inputs = {name: value for name, value in batch(data[:2]).items() if name != "labels"}
    assert torch.equal(foveate.load(tmp_path / "a" / "checkpoint-4")(**inputs).logits, whole.eval()(**inputs).logits)
    trainer.save_model(str(tmp_path / "a"))  # where the checkpoints lie
    assert torch.equal(foveate.load(tmp_path / "a")(**inputs).logits, whole(**inputs).logits)


@pytest.mark.slow
def test_accumulated_steps_equal_one_large_batch(tmp_path: Path) -> None:
    data = [*examples(1, answer=1), *examples(2, answer=4)[1:]]
    made = []
    for size, steps in ((2, 1), (1, 2)):
        opt = fresh()
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        Trainer(opt, arguments(tmp_path / str(size), 1, save_strategy="no", **settings), train_dataset=data).train()
        made.append(opt)
    assert furthest(made[0], fresh()) > 0
    assert furthest(*made) < 1e-6


@pytest.mark.slow
def test_the_trainer_may_use_mixed_precision(tmp_path: Path) -> None:
    losses = []
    for half in (False, True):
        settings = {"bf16": half, "save_strategy": "no"}
        trainer = Trainer(fresh(), arguments(tmp_path / str(half), 2, **settings), train_dataset=examples(4))
        losses.append(trainer.train().training_loss)
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.05 * losses[0]


def test_lora_starts_at_the_model_learns_and_merges() -> None:
    opt = fresh()
    data = batch(examples(4))
    inputs = {name: value for name, value in data.items() if name != "labels"}
    before = opt(**inputs).logits
    frozen = {name: value.clone() for name, value in opt.state_dict().items()}
    adapted = peft.get_peft_model(opt, lora(lora_dropout=0.1))
    assert "lm_head" not in " ".join(n for n, p in adapted.named_parameters() if p.requires_grad)
    torch.testing.assert_close(adapted.eval()(**inputs).logits, before, rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    adapted.train()
    torch.manual_seed(0)
    noisy = {adapted(**data).loss.item() for _ in range(2)}
    assert len(noisy) == 1, "B is zero at first, so dropout changes nothing"
    losses = []
    for _ in range(8):
        loss = adapted(**data).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert len({adapted(**data).loss.item() for _ in range(2)}) == 2, "dropout is on while training"
    adapted.eval()
    learnt = adapted(**inputs).logits
    options = {"max_new_tokens": 4, "do_sample": False}
    said = adapted.generate(**inputs, **options)
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(**inputs).logits, before, rtol=1e-5, atol=1e-5)
    now = opt.state_dict()
    assert all(torch.equal(frozen[n], now[n.replace("proj.w", "proj.base_layer.w")]) for n in frozen if "proj.w" in n)
    merged = adapted.merge_and_unload()
    assert merged is opt and (merged(**inputs).logits - learnt).abs().max() < 1e-4
    assert torch.equal(merged.generate(**inputs, **options), said)


def test_adapters_are_saved_apart_and_found_again(tmp_path: Path) -> None:
    adapted = peft.get_peft_model(fresh(), lora(target_modules=["q_proj", "down_proj"]))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = {name: value for name, value in batch(examples(2)).items() if name != "labels"}
    adapted.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ArtifactError, match=r"adapters that are not merged: save them through peft"):
        adapted.get_base_model().save_pretrained(tmp_path / "whole")
    fresh().save_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(foveate.load(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(**inputs).logits, adapted.eval()(**inputs).logits, rtol=1e-5, atol=1e-5)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    found = foveate.load(tmp_path / "merged")(**inputs).logits
    torch.testing.assert_close(found, adapted(**inputs).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_trainer_resumes_lora(tmp_path: Path) -> None:
    data = examples(8)
    models = [peft.get_peft_model(fresh(), lora(init_lora_weights=True)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    Trainer(models[0], arguments(tmp_path), train_dataset=data).train()
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    Trainer(models[1], arguments(tmp_path), train_dataset=data).train(resume_from_checkpoint=True)
    assert furthest(*models) == 0


def test_adapters_that_cannot_be_honoured_are_refused() -> None:
    data = batch(examples(1))
    with pytest.raises(BackendError, match=r"q_proj was replaced by a peft\..*with a variant; .* plain LoRA"):
        peft.get_peft_model(fresh(), lora(target_modules=["q_proj"], use_dora=True))(**data)
    with pytest.raises(BackendError, match=r"k_proj was replaced by a peft\.tuners\.ia3.* no other adapters"):
        ia3 = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
        peft.get_peft_model(fresh(), ia3)(**data)
    with pytest.raises(UnsupportedModelError, match=r"has adapters: merge them first"):
        foveate.optimize(peft.get_peft_model(random_llava(layers=2), lora(target_modules=["q_proj"])))


def test_weights_are_loaded_by_either_name(tmp_path: Path) -> None:
    one, other = fresh(), fresh()
    for parameter in other.parameters():
        parameter.data.zero_()
    state = one.state_dict()
    assert all(name.startswith("weights.") for name in state)
    other.load_state_dict({name.removeprefix("weights."): value for name, value in state.items()})
    assert furthest(one, other) == 0
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict({})


def test_a_checkpoint_that_is_interrupted_is_not_taken_for_a_saved_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opt = fresh()
    opt.save_pretrained(tmp_path, is_main_process=True)
    foveate.load(tmp_path)
    move = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.name == "config.json":
            raise OSError(28, "No space left on device")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(ArtifactError, match="No space left"):
        opt.save_pretrained(tmp_path, is_main_process=True)
    with pytest.raises(ArtifactError, match=r"it has no foveate\.json"):
        foveate.load(tmp_path)
    assert not any(path.is_dir() for path in tmp_path.iterdir())
    monkeypatch.undo()
    opt.save_pretrained(tmp_path / "not-here", is_main_process=False)
    assert not (tmp_path / "not-here").exists()
    assert artifact.MANIFEST == "foveate.json"


def test_another_backend_changes_nothing_about_training() -> None:
    eager, compiled = fresh(), fresh(backend="inductor")
    for rows in (examples(2), examples(3, answer=5)):
        found = []
        for opt in (eager, compiled):
            opt.zero_grad()
            loss = opt(**batch(rows)).loss
            loss.backward()
            found.append((loss.item(), [p.grad.clone() for p in opt.parameters()]))
        assert found[0][0] == found[1][0]
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
