"""The curve that `cls-curve` cuts: what is drawn is what the model keeps."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from foveate.errors import InputError
from foveate.models.random import random_inputs, random_llava
from foveate.report.curve import curve_data, curve_png
from tests.passes.check import optimize


@pytest.mark.slow
def test_the_picture_shows_what_the_model_keeps() -> None:
    model = random_llava(layers=2, visual_tokens=25)
    inputs = random_inputs(model, batch=2)
    optimized = optimize(model, "cls-curve{layer=1,alpha=0.2}")
    data = curve_data(optimized, inputs["pixel_values"])
    for image, row in zip(data, optimized(**inputs).kept[0], strict=True):
        curve = torch.tensor(image["likeness"])
        assert len(curve) == 25 and curve.sum().item() == pytest.approx(1)
        assert bool((curve.diff() <= 0).all())
        assert image["kept"] == int((row < 10**6).sum()) >= image["turn"]
    picture = Image.open(io.BytesIO(curve_png(data)))
    assert picture.format == "PNG" and picture.width > 1000
    assert curve_png(data) != curve_png([{**image, "kept": image["kept"] + 1} for image in data])


@pytest.mark.slow
def test_a_model_without_the_pass_has_no_curve() -> None:
    model = random_llava(layers=2)
    with pytest.raises(InputError, match="hold no cls-curve"):
        curve_data(optimize(model, ""), random_inputs(model)["pixel_values"])
