"""Pictures of statistics and the numbers behind them."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from foveate.errors import FoveateError
from foveate.ir.statistics import Statistics
from foveate.report import plot
from foveate.report.inspect import FIGURES, figure_data, figure_png
from tests.ir.programs import LAYERS, made_up_statistics


@pytest.fixture(scope="module")
def found() -> Statistics:
    return made_up_statistics()


def test_data_is_what_was_counted_and_fit_for_json(found: Statistics) -> None:
    data = figure_data(found)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    far = [0, *range(2, len(found.pairs))]
    assert data["distance"]["distances"] == far
    for layer in range(LAYERS):
        for place, distance in enumerate(far):
            mean = (found.by_distance[layer, :, distance] / found.pairs[distance]).mean()
            assert data["distance"]["weights"][layer][place] == pytest.approx(mean.item())
        within = data["distance"]["within"][layer]
        assert within == sorted(within) and within[-1] == pytest.approx(1)
        assert data["layers"]["mean"][layer] == pytest.approx((found.text_to_visual[layer] / 4).mean().item())
        assert data["layers"]["least"][layer] <= data["layers"]["mean"][layer] <= data["layers"]["most"][layer]
    np.testing.assert_allclose(data["heads"]["mass"], found.mass.mean(0), rtol=1e-5)


@pytest.mark.parametrize("name", FIGURES)
def test_pictures_show_the_data(found: Statistics, name: str) -> None:
    data = figure_data(found)
    picture = Image.open(io.BytesIO(figure_png(data, name)))
    assert picture.format == "PNG" and picture.width > 1000
    other = figure_data(replace(found, mass=found.mass.flip(1), text_to_visual=found.text_to_visual.flip(0)))
    other["distance"]["weights"] = other["distance"]["weights"][::-1]
    assert figure_png(other, name) != figure_png(data, name)


def test_without_matplotlib_the_command_says_how_to_get_it(found: Statistics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(FoveateError, match="needs matplotlib"):
        figure_png(figure_data(found), "heads")
