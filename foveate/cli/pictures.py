"""Pictures that `foveate run` draws of one prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from foveate.cli.errors import UseError
from foveate.files import write_whole


def draw_kept(
    model: Any, processor: Any, inputs: dict[str, Any], kept: dict[str, list[int]] | None, path: Path
) -> None:
    """Write which patches stay; kept: their places in the prompt by layer. UseError where there are none to draw."""
    from foveate.models.registry import FAMILIES
    from foveate.report.kept import kept_masks
    from foveate.report.picture import kept_sheet, png_bytes, seen_image

    if not kept or not any(name.startswith("pixel_values") for name in inputs):
        raise UseError("--kept draws what a selection keeps of images: give an image, and passes that select")
    about = model.program.info
    seen = FAMILIES[about.family].pictures(about, inputs)
    images = [seen_image(pixels, processor.image_processor) for pixels in seen]
    masks = {int(layer): kept_masks(about, inputs, places) for layer, places in kept.items()}
    write_whole(path, png_bytes(kept_sheet(images, masks)))


def draw_curve(model: Any, inputs: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """Write what `cls-curve` cuts, and return what the picture shows. UseError where there is no image."""
    from foveate.report.curve import curve_data, curve_png

    if "pixel_values" not in inputs:
        raise UseError("--curve draws images; give one with --image")
    data = curve_data(model, inputs["pixel_values"])
    write_whole(path, curve_png(data))
    return data
