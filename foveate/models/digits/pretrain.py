"""First stage: the vision tower and the projector, alone, learn what each cell shows and where it is.

    pixels [B, 3, 96, 96] -> tower -> projector -> features [B, 144, 192]
        -> token logits (through the decoder's own output matrix), row logits, column logits

Reading through the output matrix aligns visual features with answer words before the decoder sees them.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from foveate.models.digits.data import PLAIN, STRONG, DigitSet, Rng, compose, digit_set
from foveate.models.digits.processing import PATCH_SIDE
from foveate.models.digits.progress import Progress
from foveate.models.digits.questions import EMPTY, GRID, Grid
from foveate.models.digits.schedule import Plan, rate_at
from foveate.models.digits.sequences import to_tensor

READINGS = (*(str(digit) for digit in range(10)), EMPTY)
"""What a cell may read, in the order of the class logits."""

PATCH_WEIGHT = 0.3
"""Weight of the per-patch loss beside the per-cell loss, which alone leaves single patches vague."""

_PATCHES = PATCH_SIDE // GRID


def visual_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Projected features [B, 144, hidden] of pixels [B, 3, SIZE, SIZE], as the decoder receives them."""
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    projected: torch.Tensor = model.model.multi_modal_projector(hidden[model.config.vision_feature_layer][:, 1:])
    return projected


def per_cell(features: torch.Tensor) -> torch.Tensor:
    """Mean over the patches of each cell: [B, 144, D] -> [B, 16, D]."""
    tiles: torch.Tensor = features.unflatten(1, (GRID, _PATCHES, GRID, _PATCHES))
    return tiles.mean(dim=(2, 4)).flatten(1, 2)


def per_patch(cells: torch.Tensor) -> torch.Tensor:
    """Each cell's value given to all its patches: [..., 16] -> [..., 144]."""
    square: torch.Tensor = cells.unflatten(-1, (GRID, GRID))
    return square.repeat_interleave(_PATCHES, -1).repeat_interleave(_PATCHES, -2).flatten(-2)


def readings(grids: list[Grid]) -> torch.Tensor:
    """Class indices [B, 16] of what the cells read."""
    return torch.tensor([[READINGS.index(cell) for line in grid for cell in line] for grid in grids])


class PlaceHead(torch.nn.Module):
    """Reads a cell's row and column from the direction of a vector of the decoder's width; not stored."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear = torch.nn.Linear(width, 2 * GRID)

    def loss(self, vectors: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of row plus column: vectors [N, width], places [N] with `row * GRID + column`."""
        logits = self.linear(F.rms_norm(vectors.float(), (self.width,)))
        return F.cross_entropy(logits[:, :GRID], places // GRID) + F.cross_entropy(logits[:, GRID:], places % GRID)


PATCH_PLACES = per_patch(torch.arange(GRID * GRID))
"""The place of each patch's cell, [144]."""


class _Reader:
    """What this stage reads from the visual features, and the loss that defines."""

    def __init__(
        self, model: LlavaForConditionalGeneration, words: Mapping[str, int], head: PlaceHead, half: bool
    ) -> None:
        self.model = model
        self.head = head
        self.half = half
        self.answer_ids = torch.tensor([words[reading] for reading in READINGS])
        self.width = model.config.text_config.hidden_size

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        # Only the direction is read: without the norm the features grow until the decoder cannot use them.
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.half):
            features = visual_features(self.model, pixels)
        return F.rms_norm(features.float(), (self.width,))

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        answers: torch.Tensor = self.model.lm_head.weight[self.answer_ids]
        return features @ answers.T

    def loss(self, pixels: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
        features = self.features(pixels)
        cell_loss = F.cross_entropy(self.logits(per_cell(features)).flatten(0, 1), truth.flatten())
        patch_loss = F.cross_entropy(self.logits(features).flatten(0, 1), per_patch(truth).flatten())
        place_loss = self.head.loss(features.flatten(0, 1), PATCH_PLACES.repeat(len(pixels)))
        return cell_loss + PATCH_WEIGHT * patch_loss + place_loss

    def accuracy(self, rng: Rng, digits: DigitSet, count: int) -> float:
        """Share of cells read right on `count` fresh grids."""
        drawn = [compose(rng, digits, PLAIN) for _ in range(count)]
        with torch.no_grad():
            logits = self.logits(per_cell(self.features(to_tensor([pixels for pixels, _ in drawn]))))
        right = logits.argmax(-1) == readings([grid for _, grid in drawn])
        return float(right.float().mean())


def train_tower(
    model: LlavaForConditionalGeneration,
    words: Mapping[str, int],
    head: PlaceHead,
    rng: Rng,
    plan: Plan,
    progress: Progress,
) -> None:
    """Trains tower, projector, output matrix and `head` in place."""
    reader = _Reader(model, words, head, plan.half)
    digits = digit_set("train")
    parameters = [
        *model.model.vision_tower.parameters(),
        *model.model.multi_modal_projector.parameters(),
        model.lm_head.weight,
        *head.parameters(),
    ]
    optimizer = torch.optim.AdamW(parameters, lr=plan.tower_rate, betas=(0.9, 0.98), weight_decay=0.01)
    started = time.perf_counter()
    for step in progress.steps("tower", plan.tower_steps):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, plan.tower_steps, plan.tower_rate, warm=50, decay=0.5)
        drawn = [compose(rng, digits, STRONG) for _ in range(plan.batch)]
        loss = reader.loss(to_tensor([pixels for pixels, _ in drawn]), readings([grid for _, grid in drawn]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % plan.report_every == 0 or step + 1 == plan.tower_steps:
            seconds = time.perf_counter() - started
            progress.line(f"tower step {step + 1}: loss {loss.item():.3f}, {seconds:.0f} s")
    share = reader.accuracy(rng, digit_set("heldout"), plan.check)
    progress.line(f"tower: {share:.1%} of the cells of {plan.check} held-out grids read right")
