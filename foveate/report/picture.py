"""A picture of what a selection keeps: the image by patches, kept ones outlined, the others darkened."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

LEAST_SIDE = 480
"""The picture is at least this wide; an image is enlarged by whole numbers, so that pixels stay square."""

OUTLINE = (255, 176, 0)
PAPER = (255, 255, 255)
INK = (20, 20, 20)
DARKER = 0.25
MARGIN = 12
LETTER = 16


def kept_tokens_png(
    image: Image.Image, grid: tuple[int, int], kept_mask: Sequence[Sequence[bool]], caption: str
) -> Image.Image:
    """The image as the model sees it, in `grid` rows and columns; `kept_mask` [rows][columns]: what stays.

    Raises ValueError where the mask does not have the grid's shape.
    """
    rows, columns = grid
    if len(kept_mask) != rows or any(len(row) != columns for row in kept_mask):
        raise ValueError(f"the mask must have {rows} rows of {columns}, as the grid has")
    picture = _enlarge(image.convert("RGB"))
    dark = Image.eval(picture, lambda value: int(value * DARKER))
    shade = Image.new("L", picture.size, 255)
    draw = ImageDraw.Draw(shade)
    boxes = {(r, c): _box(picture.size, grid, r, c) for r in range(rows) for c in range(columns)}
    for (row, column), box in boxes.items():
        if kept_mask[row][column]:
            draw.rectangle(box, fill=0)
    picture.paste(dark, mask=shade)
    draw = ImageDraw.Draw(picture)
    for (row, column), box in boxes.items():
        if kept_mask[row][column]:
            draw.rectangle(box, outline=OUTLINE, width=2)
    return _with_caption(picture, caption)


def _enlarge(image: Image.Image) -> Image.Image:
    factor = max(1, -(-LEAST_SIDE // image.width))
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
