"""Samples to calibrate, train or ask with: a prompt, its images, and the answer where there is one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from foveate.errors import InputError


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
    if not path.exists():
        raise InputError(f"there is no image {path}")
    if path.is_dir():
        raise InputError(f"{path} is a folder, not an image")
    try:
        with Image.open(path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except PermissionError:
        raise InputError(f"{path} may not be read: permission denied") from None
    except Exception:  # Pillow's readers raise many kinds on damaged files
        raise InputError(f"{path} is not an image that Pillow can read") from None
