"""The bundled demo model: a small LLaVA that reads grids of handwritten digits.

    model, processor = load()
    for sample in samples(task="lookup", n=8):
        inputs = processor(text=sample.prompt, images=sample.image, return_tensors="pt")

Importing this module is cheap: torch and transformers are imported by `load`, not before.
"""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from foveate.models.digits.data import compose, digit_set
from foveate.models.digits.questions import GRID, TASKS, Grid, Question, parse_question, prompt_for

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

__all__ = ["Question", "Sample", "load", "parse_question", "prompt_for", "samples", "weights_path"]


@dataclass(frozen=True)
class Sample:
    """One image, one question about it, and the right answer.

    `prompt` is the question in the model's prompt form, with one `<image>` placeholder. `cells` are the
    (row, column) places, counted from 0, that the answer is read from.
    """

    image: Image.Image
    question: str
    prompt: str
    answer: str
    task: str
    grid: Grid
    cells: tuple[tuple[int, int], ...]


def weights_path() -> Path:
    """The folder with the weights, the processor files and the model card."""
    path = Path(str(importlib.resources.files("foveate.models.digits"))) / "weights"
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"the digits model has no weights at {path}; is the package complete?")
    return path


def load() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model in float32 and evaluation mode, and its processor; never asks the network."""
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    path = weights_path()
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    processor = LlavaProcessor.from_pretrained(path, local_files_only=True)
    return model.eval(), processor


def samples(split: str = "heldout", task: str = "mixed", n: int = 16, seed: int = 0) -> list[Sample]:
    """`n` samples on fresh random grids of one split's digits; the same arguments give the same samples.

    `task` is "lookup", "count", "row", or "mixed", which takes the three in turn.
    """
    if task != "mixed" and task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}, mixed")
    digits = digit_set(split)
    rng = np.random.default_rng(seed)
    drawn = []
    for index in range(n):
        pixels, grid = compose(rng, digits)
        question = _draw(rng, TASKS[index % len(TASKS)] if task == "mixed" else task, grid)
        drawn.append(
            Sample(
                image=Image.fromarray(pixels).convert("RGB"),
                question=question.text,
                prompt=prompt_for(question.text),
                answer=question.answer(grid),
                task=question.task,
                grid=grid,
                cells=question.cells(grid),
            )
        )
    return drawn


def _draw(rng: np.random.Generator, task: str, grid: Grid) -> Question:
    if task == "lookup":
        return Question("lookup", row=int(rng.integers(GRID)), column=int(rng.integers(GRID)))
    if task == "row":
        return Question("row", row=int(rng.integers(GRID)))
    # Three in four ask about a digit that is there; asked evenly, most counts would be 0.
    there = sorted({cell for line in grid for cell in line if cell.isdigit()})
    if rng.random() < 0.75:
        return Question("count", digit=int(there[int(rng.integers(len(there)))]))
    return Question("count", digit=int(rng.integers(10)))
