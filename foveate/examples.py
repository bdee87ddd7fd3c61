"""Samples to calibrate, train or ask with: a prompt, its images, and the answer where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from foveate.errors import InputError

TEXT = ("input_ids", "attention_mask")
"""What any model takes of what its processor makes; families add what they need to see images."""


@dataclass(frozen=True)
class Example:
    """One sample. prompt: the whole of it, with the processor's mark for each image, in order.

    images: pictures, or files, which are opened when their turn comes. answer: what should be said, for training.
    place: where it comes from, for messages, such as `data.jsonl, line 3`. question: what is asked, without template
    and marks, for models that choose visual tokens by it; the prompt, if not given.
    """

    prompt: str
    images: Sequence[Path | Image.Image] = ()
    answer: str = ""
    place: str = ""
    question: str = ""

    @property
    def where(self) -> str:
        """Its place, or its first words."""
        return self.place or f"the sample {self.prompt[:40]!r}"

    def pictures(self) -> list[Image.Image]:
        """The images as RGB, turned upright; InputError where a file is none."""
        try:
            return [open_image(each) if isinstance(each, Path) else each for each in self.images]
        except InputError as error:
            raise InputError(f"{self.where}: {error}") from None


def open_image(path: Path) -> Image.Image:
    """An image file as RGB, turned upright; InputError for anything else."""
    with _opened(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def check_image(path: Path) -> None:
    """Raise InputError for a file that is no image by its header; what lies behind that is not read."""
    with _opened(path):
        pass


def model_inputs(model: Any, made: Mapping[str, Any]) -> dict[str, Any]:
    """What a model takes of what its processor made, on its device and in its dtype."""
    from foveate.models.registry import FAMILIES  # which needs torch, as opening images does not

    takes = (*TEXT, *FAMILIES[model.config.model_type].takes)
    taken = {name: made[name].to(model.device) for name in takes if name in made}
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in taken.items()}


@dataclass(frozen=True)
class Question:
    """An example that is asked, and what its reply is marked by.

    answers: all that are right, or what people said. choices: what to choose from, where the answer is one of them.
    id: tells it from the others. task: the kind of question, for figures by kind.
    """

    example: Example
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    id: str = ""
    task: str = ""


def batch_inputs(
    model: Any, processor: Any, examples: Sequence[Example], new_tokens: int = 0, **options: Any
) -> dict[str, Any]:
    """Examples as one padded batch that `model` takes; options are the processor's.

    Raises InputError naming an example whose prompt, grown by `new_tokens`, is longer than the model takes, or those
    that the processor refuses.
    """
    images = [image for example in examples for image in example.pictures()]
    prompts = [example.prompt for example in examples]
    try:
        made = processor(text=prompts, images=images or None, padding=True, return_tensors="pt", **options)
    except (ValueError, IndexError) as error:
        where = _places(examples)
        raise InputError(f"{where}: the processor refuses the batch: {str(error).splitlines()[0]}") from None
    length, longest = made["input_ids"].shape[1], model.config.get_text_config().max_position_embeddings
    if length + new_tokens > longest:
        row = int(made["attention_mask"].sum(1).argmax())
        grown = f" and may grow by {new_tokens}" if new_tokens else ""
        raise InputError(
            f"{examples[row].where}: the prompt is {length} tokens long{grown}, this model takes {longest}"
        )
    from foveate.clip import questions_for  # which needs torch, as opening images does not

    asked = [example.question or example.prompt for example in examples for _ in example.images]
    return {**model_inputs(model, made), **questions_for(model, asked)}


def _places(examples: Sequence[Example]) -> str:
    first, last = examples[0].where, examples[-1].where
    return first if len(examples) == 1 else f"{first} to {last}"


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        there, folder = path.exists(), path.is_dir()
    except OSError as error:
        raise InputError(f"the image {path} cannot be read: {error.strerror or error}") from None
    if not there:
        raise InputError(f"there is no image {path}")
    if folder:
        raise InputError(f"{path} is a folder, not an image")
    try:
        with Image.open(path) as opened:
            yield opened
    except PermissionError:
        raise InputError(f"{path} may not be read: permission denied") from None
    except Exception:  # Pillow's readers raise many kinds on damaged files
        raise InputError(f"{path} is not an image that Pillow can read") from None
