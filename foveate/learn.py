"""Training the modules of a selection (`foveate.passes.select.learned`), the model itself frozen.

    loss = cross-entropy of the answer, every decision in force as a mask
         + ratio_weight * mean over stages of (share wanted - share of visual tokens that stay)^2
         + distill * KL of the answer's tokens (whole model || masked model)

LVPruning (arXiv 2501.13652, section 3.2); the last term is DynamicViT's and SmartTrim's. `Learner` trains under any
trainer; `learn_modules` is what `foveate train --part modules` runs. Needs the extra `foveate[train]`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

from foveate.backends.base import Runner
from foveate.errors import InputError, PassError
from foveate.evaluate import Tick, silent
from foveate.examples import Example
from foveate.ir.modules import Modules, shape_of
from foveate.ir.program import Program, Weights
from foveate.labels import NO_LABEL, Asked
from foveate.model import OWN, OptimizedModel, training_graphs
from foveate.ops import PAD
from foveate.passes.pipeline import Passes, apply_pipeline, resolve
from foveate.passes.select.learned import LearnedSelection
from foveate.train import Collator, Settings, Trained, fit

BETA = 0.5
"""Of the Huber loss: below it squares, above it the distance itself (LVPruning, section 3.2)."""

WEIGHTS = "model.safetensors"
"""What a Trainer looks for in a checkpoint; here it holds modules alone."""


LOOKED_AT = 256
"""Examples of which one at least must have an image."""


@dataclass(frozen=True)
class Programs:
    """The model as it is, with decisions as masks, and with tokens removed; over one set of weights."""

    whole: Program
    masked: Program
    pruned: Program


class Learner(OptimizedModel):
    """A model whose modules learn; asked without labels it removes tokens, as it will when they are trained.

    With labels, tokens are hidden by sampled decisions and the loss has the terms above. Of its parameters the modules'
    alone want a gradient; the others share their memory with the model's own.
    """

    def __init__(self, model: Any, selection: LearnedSelection, programs: Programs, settings: Settings) -> None:
        self.programs, self.selection, self.settings = programs, selection, settings
        self.stages = selection.stages(programs.pruned.info)
        self.distill = selection.distill if settings.distill is None else settings.distill
        self.terms: dict[str, float] = {}
        self.counted = 0
        super().__init__(programs.pruned, model.config, model.generation_config)
        for name in self.own:
            self.program.weights.get(name).requires_grad_()

    @property
    def own(self) -> list[str]:
        """Names of the modules' weights."""
        stems = tuple(f"{self.selection.name}.{layer}." for layer in self.stages)
        return [name for name in self.program.weights.names if name.startswith(stems)]

    def modules_now(self, trained: Mapping[str, Any] | None = None) -> Modules:
        """A copy of the modules as they are, to be saved; trained: how they came to be."""
        stem = len(self.selection.name) + 1
        tensors = {name[stem:]: self.program.weights.get(name).detach().clone() for name in self.own}
        return Modules(self.selection.name, shape_of(self.program.info), self.stages, tensors, dict(trained or {}))

    def noise(self, layer: int, shape: torch.Size, device: torch.device) -> Tensor:
        """What draws the decisions before a layer: logistic noise fp32, the difference of two Gumbel ones."""
        even = torch.rand(shape, device=device).clamp(1e-6, 1 - 1e-6)
        return torch.logit(even)

    def _lower(self) -> None:
        super()._lower()
        self._teacher: dict[str, Runner] = {}

    def _learn(
        self, inputs: dict[str, Tensor | int], asked: Asked, num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, dict[str, Any]]:
        visual = inputs["visual"]
        assert isinstance(visual, Tensor)
        drawn = {f"noise_{layer}": self.noise(layer, visual.shape[:2], visual.device) for layer in self.stages}
        loss, out = super()._learn({**inputs, **drawn}, asked, num_items_in_batch)
        terms = {"answer": loss, "ratio": self.settings.ratio_weight * self._ratio_loss(out)}
        if self.distill:
            terms["distill"] = self.distill * self._distillation(inputs, out["logits"], asked)
        if num_items_in_batch is not None:
            # The loss of the answer is already a share of several batches' sum.
            terms = {name: x if name == "answer" else x / self.settings.accumulate for name, x in terms.items()}
        for name, value in terms.items():
            self.terms[name] = self.terms.get(name, 0.0) + float(value.detach())
        self.counted += 1
        return sum(terms.values(), torch.zeros_like(loss)), out

    def _train_graphs(self) -> dict[str, Runner]:
        return training_graphs(self.programs.masked)

    def _ratio_loss(self, out: Mapping[str, Any]) -> Tensor:
        """Mean over stages and rows that have visual tokens."""
        real = (out["visual_order"] != PAD).float()
        rows = real.sum(1) > 0
        count = real.sum(1).clamp(min=1)
        wanted = self.selection.shares(len(self.stages))
        losses = []
        for share, decided in zip(wanted, out["decisions"].values(), strict=True):
            off = ((decided * real).sum(1) / count - share)[rows].abs()
            if self.settings.ratio_loss == "huber":
                losses.append(torch.where(off < BETA, 0.5 * off * off / BETA, off - 0.5 * BETA).sum())
            else:
                losses.append((off * off).sum())
        total: Tensor = torch.stack(losses).sum() / (len(losses) * rows.sum().clamp(min=1))
        return total

    def _distillation(self, inputs: dict[str, Tensor | int], logits: Tensor, asked: Asked) -> Tensor:
        """Mean over labels of the divergence from what the model says that sees every token."""
        if not self._teacher:
            self._teacher = training_graphs(self.programs.whole)
        with torch.no_grad():
            taught = self._teacher["train"](inputs)["logits"]
        answered = asked.labels != NO_LABEL
        ours, theirs = (x[answered].float().log_softmax(-1) for x in (logits, taught))
        found: Tensor = kl_div(ours, theirs, log_target=True, reduction="batchmean")
        return found

    def mean_terms(self) -> dict[str, float]:
        """Each term's mean over steps since this was asked last."""
        steps = max(1, self.counted) / self.settings.accumulate
        means = {f"{name}_loss": value / steps for name, value in self.terms.items()}
        self.terms, self.counted = {}, 0
        return means

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        """Write the modules alone; a checkpoint holds nothing else of the model."""
        if options.get("is_main_process") is False:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {OWN + name: self.program.weights.get(name).detach().contiguous() for name in self.own}
        safetensors.torch.save_file(weights, folder / WEIGHTS, {"format": "pt"})

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As for any model; what is missing of the frozen weights is no matter."""
        found = super().load_state_dict(state_dict, False, assign)
        missing = [name for name in found.missing_keys if name.removeprefix(OWN) in self.own]
        return type(found)(missing, found.unexpected_keys)


def learner(model: Any, passes: Passes, settings: Settings, traced: Program | None = None) -> Learner:
    """A model whose modules learn, with new ones or those of the pass's file.

    passes: the last is the one that has modules; others before it stay as they are. Raises PassError where it is not
    so, or where modules cannot be trained beside another pass.
    """
    from foveate.api import trace
    from foveate.models.registry import family_of

    found = resolve(passes)
    learning = [each for each in found if isinstance(each, LearnedSelection)]
    if len(learning) != 1 or learning[0] is not found[-1]:
        raise PassError("training modules takes passes of which the last, and no other, has modules, such as lvpruning")
    last, others = learning[0], found[:-1]
    if set(last.shares(len(last.stages(family_of(model).describe(model.config))))) == {1.0}:
        raise PassError(f"{last.text()} removes nothing, so there is nothing to learn")
    whole = apply_pipeline(trace(model) if traced is None else traced.copy(), others)
    whole.forget_unused()
    whole.weights = Weights.of((name, _frozen(value)) for name, value in whole.weights.items())
    pruned, masked = whole.copy(), whole.copy()
    last.put(pruned, last.new(pruned, settings.seed))
    apply_pipeline(pruned, [last])
    # One set of weights, so that all three move to another device together.
    whole.weights = masked.weights = pruned.weights
    last.mask(masked)
    return Learner(model, last, Programs(whole, masked, pruned), settings)


def _frozen(value: Tensor) -> Tensor:
    return nn.Parameter(value.detach(), requires_grad=False) if isinstance(value, nn.Parameter) else value


def learn_modules(
    trained: Learner,
    processor: Any,
    examples: Sequence[Example],
    folder: Path,
    *,
    resume: bool = False,
    tick: Tick = silent,
) -> tuple[Modules, Trained]:
    """Train modules; see `foveate.train.finetune` for the folder, resuming and errors.

    Raises InputError, too, where no example has an image.
    """
    if len(examples) and not any(examples[place].images for place in range(min(len(examples), LOOKED_AT))):
        raise InputError(
            f"none of the first {LOOKED_AT} examples has an image, so there are no visual tokens to choose from"
        )
    result = fit(trained, Collator(processor), examples, trained.settings, folder, resume, tick, trained.mean_terms)
    told = {"passes": [record.text for record in trained.program.passes], "steps": result.steps}
    return trained.modules_now({**told, **vars(trained.settings)}), result
