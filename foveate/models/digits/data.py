"""Image composition: handwritten digits and clutter on a 4x4 grid.

The digits are the 1,797 images of the UCI Optical Recognition of Handwritten Digits test set (8x8,
17 grey levels), stored in `digits.npz` with a fixed split by sample. No image of the held-out part
is ever drawn into a training grid.
"""

from __future__ import annotations

import functools
import importlib.resources
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from foveate.models.digits.questions import EMPTY, GRID, Grid

CELL = 24
"""Pixels along one side of a cell."""

SIZE = GRID * CELL
"""Pixels along one side of the image."""

MOST_NON_DIGITS = 6
"""A grid holds 0 to this many cells that are blank or cluttered."""

SPLITS = ("train", "heldout")

Pixels = npt.NDArray[np.uint8]
Rng = np.random.Generator


@dataclass(frozen=True)
class DigitSet:
    """Single digits: `images` [count, 8, 8] with grey levels 0..16, and `labels` [count] with 0..9."""

    images: Pixels
    labels: Pixels

    @functools.cached_property
    def by_label(self) -> tuple[npt.NDArray[np.intp], ...]:
        """For each digit, the indices of the images that show it."""
        return tuple(np.flatnonzero(self.labels == label) for label in range(10))


@functools.cache
def digit_set(split: str) -> DigitSet:
    """The digits of one split, read from package data."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    path = importlib.resources.files("foveate.models.digits") / "digits.npz"
    with importlib.resources.as_file(path) as file, np.load(file, allow_pickle=False) as stored:
        chosen = stored["heldout"] == (split == "heldout")
        return DigitSet(images=stored["images"][chosen], labels=stored["labels"][chosen])


@dataclass(frozen=True)
class Style:
    """How far a drawn digit strays from the stored one. Lengths in pixels, angles in degrees."""

    smallest: float = 18.0
    largest: float = 22.0
    shift: float = 1.5
    rotation: float = 5.0
    shear: float = 0.05
    faintest: float = 0.7
    blend: float = 0.0
    noise: float = 6.0


PLAIN = Style()
"""The style of evaluation grids and of most training grids."""

STRONG = Style(smallest=16.0, largest=23.0, shift=2.5, rotation=12.0, shear=0.15, faintest=0.55, blend=0.35, noise=10.0)
"""A wider style that the training uses so that 1,400 digits do not get learnt by heart."""


def draw_digit(rng: Rng, digits: DigitSet, label: int, style: Style) -> npt.NDArray[np.float32]:
    """One cell [CELL, CELL] in 0..1 that shows a random image of `label`."""
    of_label = digits.by_label[label]
    glyph = digits.images[rng.choice(of_label)].astype(np.float32) / 16.0
    if style.blend and rng.random() < 0.5:
        other = digits.images[rng.choice(of_label)].astype(np.float32) / 16.0
        weight = style.blend * rng.random()
        glyph = (1 - weight) * glyph + weight * other
    size = rng.uniform(style.smallest, style.largest)
    angle = np.deg2rad(rng.uniform(-style.rotation, style.rotation))
    shear = rng.uniform(-style.shear, style.shear)
    stretch = rng.uniform(0.94, 1.06)
    shift = rng.uniform(-style.shift, style.shift, size=2)
    # PIL's affine maps output pixels to input pixels, so this is the inverse of "scale, shear, rotate".
    scale_x, scale_y = 8 / (size * stretch), 8 / size * stretch
    cos, sin = np.cos(angle), np.sin(angle)
    a, b = scale_x * cos, scale_x * (sin + shear)
    d, e = -scale_y * sin, scale_y * cos
    middle = CELL / 2
    c = 4 - a * (middle + shift[0]) - b * (middle + shift[1])
    f = 4 - d * (middle + shift[0]) - e * (middle + shift[1])
    # A border of zeros keeps the bicubic window inside the source, so strokes fade instead of ending square.
    source = Image.fromarray(np.pad(glyph, 2))
    drawn = source.transform(
        (CELL, CELL), Image.Transform.AFFINE, (a, b, c + 2, d, e, f + 2), resample=Image.Resampling.BICUBIC
    )
    strength = rng.uniform(style.faintest, 1.0)
    return np.asarray(drawn, dtype=np.float32).clip(0, 1) * np.float32(strength)


def draw_clutter(rng: Rng) -> npt.NDArray[np.float32]:
    """One cell [CELL, CELL] in 0..1 that shows something which is no digit: noise, dots, strokes or bars."""
    cell = np.zeros((CELL, CELL), dtype=np.float32)
    kind = rng.integers(4)
    if kind == 0:  # coarse noise
        coarse = rng.random((8, 8)).astype(np.float32)
        cell[:] = np.kron(coarse, np.ones((3, 3), dtype=np.float32)) * rng.uniform(0.3, 0.8)
    elif kind == 1:  # loose dots
        for _ in range(rng.integers(4, 9)):
            y, x = rng.integers(1, CELL - 3, size=2)
            cell[y : y + 2, x : x + 2] = rng.uniform(0.5, 1.0)
    elif kind == 2:  # long diagonal strokes, edge to edge
        y, x = np.mgrid[:CELL, :CELL]
        for _ in range(rng.integers(2, 5)):
            slope = rng.choice([-1.0, 1.0]) * rng.uniform(0.6, 1.6)
            offset = rng.uniform(-8, 8)
            distance = np.abs((y - CELL / 2) - slope * (x - CELL / 2) - offset) / np.hypot(1, slope)
            cell = np.maximum(cell, ((1.4 - distance).clip(0, 1) * rng.uniform(0.5, 1.0)).astype(np.float32))
    else:  # even bars
        phase, period = rng.integers(6), rng.integers(4, 7)
        bars = ((np.arange(CELL) + phase) % period < 2).astype(np.float32) * rng.uniform(0.4, 1.0)
        cell[:] = bars[:, None] if rng.random() < 0.5 else bars[None, :]
    return cell


def draw_labels(rng: Rng) -> list[list[int]]:
    """Labels of a random grid: 0..9, -1 for a blank cell, -2 for a cluttered one."""
    # Half of the grids use few different digits, so that counts above two are not rare.
    few = rng.choice(10, size=rng.integers(2, 6), replace=False)
    pool = np.arange(10) if rng.random() < 0.5 else few
    labels = rng.choice(pool, size=GRID * GRID)
    spoiled = rng.choice(GRID * GRID, size=rng.integers(0, MOST_NON_DIGITS + 1), replace=False)
    labels[spoiled] = rng.choice([-1, -2], size=len(spoiled))
    return [[int(value) for value in line] for line in labels.reshape(GRID, GRID)]


def compose(rng: Rng, digits: DigitSet, style: Style = PLAIN) -> tuple[Pixels, Grid]:
    """A random grid: grey pixels [SIZE, SIZE] and what every cell reads."""
    labels = draw_labels(rng)
    canvas = np.zeros((SIZE, SIZE), dtype=np.float32)
    for row, line in enumerate(labels):
        for column, label in enumerate(line):
            if label == -1:
                continue
            cell = draw_clutter(rng) if label == -2 else draw_digit(rng, digits, label, style)
            canvas[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = cell
    background = rng.uniform(0, 30)
    pixels = background + canvas * (255 - background) + rng.normal(0, style.noise, size=canvas.shape)
    grid = tuple(tuple(str(label) if label >= 0 else EMPTY for label in line) for line in labels)
    return pixels.round().clip(0, 255).astype(np.uint8), grid
