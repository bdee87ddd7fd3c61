"""Fine-tuning an optimized model on questions, images and answers with `transformers.Trainer`.

`Collator` makes batches for any trainer; `finetune` is what `foveate train` runs. Needs the extra `foveate[train]`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch

from foveate.errors import BackendError, InputError
from foveate.evaluate import Tick, silent
from foveate.examples import Example
from foveate.ir.modules import MODULE
from foveate.ir.program import info
from foveate.labels import NO_LABEL
from foveate.model import OptimizedModel


@dataclass(frozen=True)
class Settings:
    """How to train. steps: of the optimizer, else `epochs` times the data; lora_rank: 0 trains the weights themselves.

    part: `decoder` leaves the vision tower and projector as they are, `all` trains them too, `modules` is for
    `foveate.learn`, as are ratio_weight, ratio_loss and distill (None: as the method's paper has it). half: bfloat16
    autocast.
    """

    steps: int | None = None
    epochs: float = 1.0
    rate: float = 1e-4
    batch: int = 8
    accumulate: int = 1
    lora_rank: int = 0
    part: Literal["decoder", "all", "modules"] = "decoder"
    seed: int = 0
    save_every: int = 100
    half: bool = False
    ratio_weight: float = 2.0
    ratio_loss: Literal["mse", "huber"] = "mse"
    distill: float | None = None


@dataclass(frozen=True)
class Trained:
    """What a run did. losses: (step, mean loss since the one before); parameters: how many were trained.

    terms: (step, means) of the parts that the loss is a sum of, where it has parts.
    """

    steps: int
    losses: tuple[tuple[int, float], ...]
    parameters: int
    seconds: float
    terms: tuple[tuple[int, dict[str, float]], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The same as plain data, with the first and the last loss by name."""
        first, last = (self.losses[i][1] if self.losses else None for i in (0, -1))
        return {
            "steps": self.steps,
            "parameters": self.parameters,
            "seconds": self.seconds,
            "first_loss": first,
            "last_loss": last,
            "losses": [list(each) for each in self.losses],
            "terms": [{"step": step, **means} for step, means in self.terms],
        }


class Collator:
    """Batches of examples as a model takes them, with labels on the answer and the end of text behind it."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """input_ids, attention_mask, pixel_values, labels."""
        images = [image for example in examples for image in example.pictures()]
        texts = [self.text(example) for example in examples]
        inputs = dict(self.processor(text=texts, images=images or None, padding=True, return_tensors="pt"))
        labels = torch.full_like(inputs["input_ids"], NO_LABEL)
        for row, example in enumerate(examples):
            places = inputs["attention_mask"][row].nonzero().squeeze(1)[-self.answer_tokens(example) :]
            labels[row, places] = inputs["input_ids"][row, places]
        return {**inputs, "labels": labels}

    def text(self, example: Example) -> str:
        """Prompt and answer as one text, as the model should have written it."""
        return f"{example.prompt} {example.answer}{self.tokenizer.eos_token or ''}"

    def answer_tokens(self, example: Example) -> int:
        """How many tokens follow those that the prompt alone has."""
        prompt, whole = (self.tokenizer(text).input_ids for text in (example.prompt, self.text(example)))
        return len(whole) - sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))

    def length(self, example: Example, tokens_per_image: int) -> int:
        """Tokens of the whole sequence."""
        return len(self.tokenizer(self.text(example)).input_ids) + len(example.images) * (tokens_per_image - 1)


def check_lengths(model: OptimizedModel, collator: Collator, examples: Sequence[Example]) -> None:
    """Raise InputError naming the first example that is longer than the model takes."""
    longest = model.config.get_text_config().max_position_embeddings
    for example in examples:
        length = collator.length(example, model.program.info.tokens_per_image)
        if length > longest:
            raise InputError(f"{example.where}: prompt and answer are {length} tokens long; this model takes {longest}")


def finetune(
    model: OptimizedModel,
    processor: Any,
    examples: Sequence[Example],
    settings: Settings,
    folder: Path,
    *,
    resume: bool = False,
    tick: Tick = silent,
) -> Trained:
    """Train `model` in place; LoRA layers are merged into it at the end.

    folder: where checkpoints are kept, the newest only; with `resume` the run goes on from there. Raises BackendError
    where the extra is not installed, InputError where there is nothing to resume or to learn.
    """
    _check_packages(settings)
    with ExitStack() as stack:
        for weight in (*_module_weights(model), *(_vision_weights(model) if settings.part == "decoder" else ())):
            stack.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(False)
        trained = _with_lora(model, settings) if settings.lora_rank else model
        result = fit(trained, Collator(processor), examples, settings, folder, resume, tick)
        if settings.lora_rank:
            trained.merge_and_unload()
    model.eval()
    return result


def fit(
    model: Any,
    collator: Collator,
    examples: Sequence[Example],
    settings: Settings,
    folder: Path,
    resume: bool,
    tick: Tick,
    terms: Callable[[], dict[str, float]] | None = None,
) -> Trained:
    """Train what of a model wants a gradient, in place. terms: means of the loss's parts since they were asked last."""
    _check_packages(settings)
    from transformers import set_seed
    from transformers.trainer_utils import get_last_checkpoint

    if not len(examples):
        raise InputError("there is no example to learn from")
    checkpoint = get_last_checkpoint(str(folder)) if resume and folder.is_dir() else None
    if resume and checkpoint is None:
        raise InputError(f"{folder} holds no checkpoint to resume from")
    set_seed(settings.seed)
    begun = time.perf_counter()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    trainer = _trainer(terms)(
        model=model,
        args=_arguments(settings, folder),
        train_dataset=examples,
        data_collator=collator,
        callbacks=[_watch(tick)],
    )
    _silence(trainer)
    trainer.train(resume_from_checkpoint=checkpoint)
    model.eval()
    logs = [x for x in trainer.state.log_history if "loss" in x]
    parts = [(x["step"], {name: x[name] for name in x if name.endswith("_loss")}) for x in logs]
    return Trained(
        trainer.state.global_step,
        tuple((x["step"], x["loss"]) for x in logs),
        parameters,
        time.perf_counter() - begun,
        tuple(each for each in parts if each[1]),
    )


def _check_packages(settings: Settings) -> None:
    for package in ("accelerate", *(["peft"] if settings.lora_rank else [])):
        if find_spec(package) is None:
            raise BackendError(f"training needs {package}: pip install 'foveate[train]'")


def _trainer(terms: Callable[[], dict[str, float]] | None) -> Any:
    """The Trainer, which logs the loss's parts beside it."""
    from transformers import Trainer

    class Telling(Trainer):  # type: ignore[misc]  # transformers is untyped
        def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
            also = terms() if terms is not None and "loss" in logs else {}
            super().log({**logs, **also}, *args, **options)

    return Telling


def _vision_weights(model: OptimizedModel) -> list[torch.nn.Parameter]:
    """Parameters that the vision tower's graphs read and no other does."""
    program = model.program
    seen = {str(n.target) for graph in program.tower.values() for n in graph.nodes if n.op == "get_attr"}
    values = [model.weights.get(name) for name in sorted(seen - {str(n.target) for n in program.prefill.nodes})]
    return [value for value in values if isinstance(value, torch.nn.Parameter)]


def _module_weights(model: OptimizedModel) -> list[torch.nn.Parameter]:
    """Parameters of selections that learnt: what they choose has no derivative, so here they learn nothing."""
    read = [n for n in model.program.prefill.nodes if n.op == "get_attr"]
    values = [model.weights.get(str(n.target)) for n in read if all(info(user).role == MODULE for user in n.users)]
    return [value for value in values if isinstance(value, torch.nn.Parameter)]


def _with_lora(model: OptimizedModel, settings: Settings) -> Any:
    """The model with LoRA layers on the linears of its decoder layers (and of its tower, for `all`)."""
    import peft

    head = model.get_output_embeddings()
    linears = [h.path for h in model.weights.holders() if type(h.module) is torch.nn.Linear and h.module is not head]
    layers = model.program.info.paths["layers"]
    chosen = [path for path in linears if settings.part == "all" or path.startswith(layers)]
    config = peft.LoraConfig(
        r=settings.lora_rank, lora_alpha=2 * settings.lora_rank, target_modules=chosen, task_type="CAUSAL_LM"
    )
    return peft.get_peft_model(model, config)


def _arguments(settings: Settings, folder: Path) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps or -1,
        num_train_epochs=settings.epochs,
        learning_rate=settings.rate,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        warmup_steps=0.05,
        lr_scheduler_type="cosine",
        seed=settings.seed,
        save_steps=settings.save_every,
        save_total_limit=1,
        logging_steps=0.05,
        logging_first_step=True,
        bf16=settings.half,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def _watch(tick: Tick) -> Any:
    """A callback of the Trainer that tells `tick` of every step."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
        def on_train_begin(self, args: Any, state: Any, control: Any, **also: Any) -> None:
            tick("training", state.global_step, state.max_steps)

        on_step_end = on_train_begin

    return Watch()


def _silence(trainer: Any) -> None:
    """The Trainer prints every log to stdout unless told otherwise."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
