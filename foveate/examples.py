"""Samples to calibrate, train or ask with: a prompt, its images, and the answer where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from foveate.errors import InputError

TAKEN = ("input_ids", "attention_mask", "pixel_values")
"""What a model takes of what its processor makes."""


@dataclass(frozen=True)
class Example:
    """One sample. prompt: the whole of it, with the processor's mark for each image, in order.

    images: pictures, or files, which are opened when their turn comes. answer: what should be said, for training.
    place: where it comes from, for messages, such as `data.jsonl, line 3`.
    """

    prompt: str
    images: Sequence[Path | Image.Image] = ()
    answer: str = ""
    place: str = ""

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
    taken = {name: made[name].to(model.device) for name in TAKEN if name in made}
    return {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in taken.items()}


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    if not path.exists():
        raise InputError(f"there is no image {path}")
    if path.is_dir():
        raise InputError(f"{path} is a folder, not an image")
    try:
        with Image.open(path) as opened:
            yield opened
    except PermissionError:
        raise InputError(f"{path} may not be read: permission denied") from None
    except Exception:  # Pillow's readers raise many kinds on damaged files
        raise InputError(f"{path} is not an image that Pillow can read") from None
