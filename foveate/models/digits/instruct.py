"""Second stage: the whole model learns to answer, many questions about one image in one sequence."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from foveate.models.digits import Sample
from foveate.models.digits.data import Rng, digit_set
from foveate.models.digits.evaluate import accuracy
from foveate.models.digits.pretrain import PATCH_PLACES, PlaceHead
from foveate.models.digits.progress import Progress
from foveate.models.digits.schedule import Plan, rate_at
from foveate.models.digits.sequences import NO_LOSS, Batch, Draw, draw_batch, draw_many, draw_one, draw_rows

FEW_COUNTS, MANY_COUNTS = 2, 5
"""Most counting questions in a sequence: few until look-up is found, many later."""


PLACE_LAYER, PLACE_WEIGHT = 4, 0.3
"""After how many decoder layers places are asked for, and the weight of that loss."""


@dataclass(frozen=True)
class Lesson:
    """What a step asks: how questions are drawn, how many images it takes, the share in reading order."""

    draw: Draw
    images: int
    ordered: float


def lesson(step: int, plan: Plan) -> Lesson:
    """The curriculum at 0-based `step`: rows, then everything, then one question a sequence."""
    if step >= plan.steps * (1 - plan.single_share):
        # One question makes a short sequence, so more images fit in the same time.
        return Lesson(draw_one, 2 * plan.batch, 0.0)
    if step < plan.row_steps:
        return Lesson(draw_rows, plan.batch, _ordered(step / plan.row_steps))
    share = (step - plan.row_steps) / (plan.steps - plan.row_steps)
    counts = MANY_COUNTS if share >= 0.4 else FEW_COUNTS
    return Lesson(partial(draw_many, counts=counts), plan.batch, _ordered(share))


def _ordered(share: float) -> float:
    # Reading order is learnt first and leads to the rest; once learnt, it only takes room.
    return 0.5 if share < 0.33 else 0.25


def losses(
    model: LlavaForConditionalGeneration, head: PlaceHead, batch: Batch, half: bool
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Answer loss, place loss, and the share of answer words that the model puts first.

    The place loss asks, after `PLACE_LAYER` layers, which cell the next answer word is read from (of the
    token that says it) and which cell a visual token belongs to, both through one head. So question and image
    name places alike, and the layers above find a cell by likeness, which answers alone teach very slowly.
    """
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        # No mask is needed: the padding is on the right, where a causal model does not look.
        out = model.model(input_ids=batch.ids, pixel_values=batch.pixels, use_cache=False, output_hidden_states=True)
        labels, places = batch.labels[:, 1:], batch.places[:, 1:]
        asked = labels != NO_LOSS
        logits = model.lm_head(out.last_hidden_state[:, :-1][asked]).float()
    middle = out.hidden_states[PLACE_LAYER]
    visual = middle[batch.ids == model.config.image_token_id]
    place_loss = head.loss(visual, PATCH_PLACES.repeat(len(batch.ids)))
    if (pointed := places != NO_LOSS).any():
        place_loss = place_loss + head.loss(middle[:, :-1][pointed], places[pointed])
    truth = labels[asked]
    words = truth != model.config.text_config.eos_token_id
    right = (logits.argmax(-1) == truth)[words]
    return F.cross_entropy(logits, truth), place_loss, float(right.float().mean())


def train_whole(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    head: PlaceHead,
    rng: Rng,
    plan: Plan,
    progress: Progress,
    checks: Mapping[str, Sequence[Sample]],
    keep: Callable[[], object],
) -> None:
    """Trains all parameters in place.

    Every `plan.report_every` steps the held-out `checks` are printed and `keep` is called to save the state.
    """
    words = processor.tokenizer.get_vocab()
    digits = digit_set("train")
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.01)
    recent: deque[tuple[float, float, float]] = deque(maxlen=50)
    started = time.perf_counter()
    for step in progress.steps("whole", plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, plan.steps, plan.rate, warm=50, decay=0.35)
        now = lesson(step, plan)
        batch = draw_batch(rng, digits, words, now.images, now.draw, now.ordered)
        answer_loss, place_loss, share = losses(model, head, batch, plan.half)
        loss = answer_loss + PLACE_WEIGHT * place_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        recent.append((answer_loss.item(), place_loss.item(), share))
        if (step + 1) % plan.report_every == 0 or step + 1 == plan.steps:
            model.eval()
            held_out = {task: accuracy(model, processor, drawn) for task, drawn in checks.items()}
            keep()
            model.train()
            answer, place, share = (sum(column) / len(recent) for column in zip(*recent, strict=True))
            figures = ", ".join(f"{task} {part:.1%}" for task, part in held_out.items())
            seconds = time.perf_counter() - started
            progress.line(
                f"step {step + 1}: loss {answer:.3f}, place loss {place:.3f}, answer words {share:.1%}; "
                f"held out: {figures}; {seconds:.0f} s"
            )
