"""Pictures of statistics and the numbers behind them."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.errors import FoveateError
from foveate.ir.statistics import Statistics
from foveate.report import plot
from foveate.report.inspect import FIGURES, figure_data, figure_png
from tests.cli.conftest import run  # noqa: F401  a fixture
from tests.ir.programs import HEADS, LAYERS, traced


@pytest.fixture(scope="module")
def found() -> Statistics:
    empty = Statistics.empty(traced()[1].info, {"model": "made up"})
    draw = torch.Generator().manual_seed(0)
    far = len(empty.pairs)
    pairs = torch.arange(far, 0, -1, dtype=torch.float64)
    pairs[1] = 0
    return replace(
        empty,
        mass=torch.rand(4, LAYERS, HEADS, generator=draw),
        output=torch.rand(4, LAYERS, HEADS, generator=draw),
        text_to_visual=4 * torch.rand(LAYERS, HEADS, generator=draw, dtype=torch.float64),
        by_distance=pairs * torch.rand(LAYERS, HEADS, far, generator=draw, dtype=torch.float64),
        pairs=pairs,
    )


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


def test_the_command_writes_pictures_and_numbers(run, found: Statistics, tmp_path: Path) -> None:  # noqa: F811
    stats, folder = tmp_path / "x.safetensors", tmp_path / "pictures"
    found.save(stats)
    for _ in range(2):
        result = run("inspect", stats, "-o", folder, "--json")
        assert result.exit_code == 0, result.stderr
    assert sorted(json.loads(result.stdout)["files"]) == sorted(p.name for p in folder.iterdir())
    assert json.loads((folder / "figures.json").read_text()) == figure_data(found)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    for args, message in (
        ((stats, "-o", tmp_path / "other"), "holds other files"),
        ((tmp_path / "gone", "-o", folder), "cannot be read: there is no such file"),
    ):
        result = run("inspect", *args)
        assert result.exit_code == 2 and message in result.stderr


def test_without_matplotlib_the_command_says_how_to_get_it(found: Statistics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(FoveateError, match="needs matplotlib"):
        figure_png(figure_data(found), "heads")
