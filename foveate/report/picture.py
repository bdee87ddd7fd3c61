"""Pictures of what selections keep: images by patches, kept ones outlined, the others darkened."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

LEAST_SIDE = 480
"""The picture is at least this wide; an image is enlarged by whole numbers, so that pixels stay square."""

PANEL_SIDE = 240
"""The same for one of several."""

OUTLINE = (255, 176, 0)
PAPER = (255, 255, 255)
INK = (20, 20, 20)
DARKER = 0.25
MARGIN = 12
LETTER = 16


Mask = Sequence[Sequence[bool]]
"""[rows][columns] of an image's grid: what stays."""


Masks = Mapping[int, Sequence[Mask]]
"""Layer -> one mask an image."""


def seen_image(pixels: Tensor, processor: Any) -> Image.Image:
    """An image as the model sees it, cut and scaled, from its pixel values [3, height, width]."""
    mean, std = (pixels.new_tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    levels = ((pixels * std + mean) * 255).round().clamp(0, 255)
    return Image.fromarray(levels.byte().permute(1, 2, 0).cpu().numpy())


def kept_sheet(images: Sequence[Image.Image], masks: Masks) -> Image.Image:
    """A row an image, a column a layer before which tokens are selected."""
    panels = []
    for number, image in enumerate(images):
        for layer, of_layer in masks.items():
            mask = of_layer[number]
            stay = sum(map(sum, mask))
            caption = f"image {number + 1}, layer {layer}: {stay} of {len(mask) * len(mask[0])}"
            panels.append(kept_tokens_png(image, mask, caption, PANEL_SIDE))
    width, height = (max(getattr(panel, side) for panel in panels) for side in ("width", "height"))
    sheet = Image.new("RGB", (width * len(masks), height * len(images)), PAPER)
    for place, panel in enumerate(panels):
        sheet.paste(panel, (place % len(masks) * width, place // len(masks) * height))
    return sheet


def kept_tokens_png(image: Image.Image, kept_mask: Mask, caption: str, side: int = LEAST_SIDE) -> Image.Image:
    """The image as the model sees it, divided as `kept_mask` [rows][columns] is, which says what stays.

    Raises ValueError where the mask's rows are not equally long.
    """
    rows, columns = len(kept_mask), len(kept_mask[0])
    if any(len(row) != columns for row in kept_mask):
        raise ValueError(f"every row of the mask must have {columns} columns")
    picture = _enlarge(image.convert("RGB"), side)
    dark = Image.eval(picture, lambda value: int(value * DARKER))
    shade = Image.new("L", picture.size, 255)
    draw = ImageDraw.Draw(shade)
    boxes = {(r, c): _box(picture.size, (rows, columns), r, c) for r in range(rows) for c in range(columns)}
    for (row, column), box in boxes.items():
        if kept_mask[row][column]:
            draw.rectangle(box, fill=0)
    picture.paste(dark, mask=shade)
    draw = ImageDraw.Draw(picture)
    for (row, column), box in boxes.items():
        if kept_mask[row][column]:
            draw.rectangle(box, outline=OUTLINE, width=2)
    return _with_caption(picture, caption)


def png_bytes(picture: Image.Image) -> bytes:
    """The file of a picture."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _enlarge(image: Image.Image, side: int) -> Image.Image:
    factor = max(1, -(-side // image.width))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _box(size: tuple[int, int], grid: tuple[int, int], row: int, column: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a patch, corners included."""
    (width, height), (rows, columns) = size, grid
    left, right = column * width // columns, (column + 1) * width // columns - 1
    top, bottom = row * height // rows, (row + 1) * height // rows - 1
    return left, top, right, bottom


def _with_caption(picture: Image.Image, caption: str) -> Image.Image:
    font = ImageFont.load_default(LETTER)
    lines = [part for line in caption.splitlines() for part in _wrap(line, font, picture.width)]
    step = LETTER + LETTER // 2
    page = Image.new("RGB", (picture.width + 2 * MARGIN, picture.height + 3 * MARGIN + step * len(lines)), PAPER)
    page.paste(picture, (MARGIN, MARGIN))
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        draw.text((MARGIN, picture.height + 2 * MARGIN + number * step), line, fill=INK, font=font)
    return page


def _wrap(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Words of a line, broken where they would be wider than `width` pixels."""
    lines = [""]
    for word in line.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
