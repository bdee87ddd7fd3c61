"""The picture of kept tokens: kept patches as they were, the others dark."""

from __future__ import annotations

import pytest
from PIL import Image

from foveate.report.picture import DARKER, LEAST_SIDE, MARGIN, OUTLINE, PAPER, kept_tokens_png

GREY = (200, 200, 200)


def picture(mask: list[list[bool]], size: tuple[int, int] = (20, 20), caption: str = "why") -> Image.Image:
    return kept_tokens_png(Image.new("RGB", size, GREY), mask, caption)


def test_kept_patches_are_bright_and_outlined_others_dark() -> None:
    drawn = picture([[True, False], [False, False]])
    quarter = LEAST_SIDE // 4
    assert drawn.getpixel((MARGIN + quarter, MARGIN + quarter)) == GREY
    assert drawn.getpixel((MARGIN + 3 * quarter, MARGIN + quarter)) == tuple(int(DARKER * v) for v in GREY)
    assert drawn.getpixel((MARGIN, MARGIN)) == OUTLINE
    assert drawn.getpixel((MARGIN + 2 * quarter, MARGIN)) != OUTLINE


def test_pixels_stay_square_blocks() -> None:
    source = Image.new("RGB", (20, 20), GREY)
    source.putpixel((5, 5), (1, 2, 3))
    drawn = kept_tokens_png(source, [[True]], "")
    factor = LEAST_SIDE // 20
    block = drawn.crop((MARGIN + 5 * factor, MARGIN + 5 * factor, MARGIN + 6 * factor, MARGIN + 6 * factor))
    assert block.getcolors() == [(factor * factor, (1, 2, 3))]


def test_the_image_given_is_not_changed() -> None:
    source = Image.new("RGB", (20, 20), GREY)
    kept_tokens_png(source, [[False, False], [False, False]], "x")
    assert source.getcolors() == [(400, GREY)]


def test_a_large_image_is_not_enlarged_and_a_grey_one_is_drawn() -> None:
    assert picture([[True] * 2] * 2, size=(700, 500)).width == 700 + 2 * MARGIN
    assert kept_tokens_png(Image.new("L", (16, 16)), [[True] * 2] * 2, "x").mode == "RGB"


def test_a_long_caption_is_broken_into_lines_that_fit() -> None:
    short, long = picture([[True] * 2] * 2), picture([[True] * 2] * 2, caption="many words " * 30)
    assert long.width == short.width
    assert long.height > short.height
    right = long.crop((long.width - MARGIN, 0, long.width, long.height))
    assert right.getcolors() == [(MARGIN * long.height, PAPER)]


@pytest.mark.parametrize("mask", [[[True, False], [True]], [[True], [False, False]]])
def test_a_mask_that_is_no_grid_is_refused(mask: list[list[bool]]) -> None:
    with pytest.raises(ValueError, match=r"every row of the mask must have [12] columns"):
        picture(mask)
