"""Passes that look at statistics choose what the statistics say, and equal the masked oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.errors import ArtifactError, FoveateWarning, PassError
from foveate.ir.statistics import Statistics
from foveate.models.random import random_inputs
from foveate.passes import CutVisual, DropVisualHeads, DropVisualNeurons
from tests.oracle.masks import Masks
from tests.passes.check import PROMPTS, check_pass, optimize, traced
from tests.passes.conftest import FFN, HEADS, LAYERS

SAMPLES = 5
FEW = (PROMPTS[0], PROMPTS[2])


def statistics(model: Any) -> Statistics:
    """Random ones: about half of the ratios lie above 0.1."""
    empty = Statistics.empty(traced(model).info, {"model": "random"})
    draw = torch.Generator().manual_seed(5)
    mass, output = (torch.rand(SAMPLES, LAYERS, HEADS, generator=draw) * 0.2 for _ in range(2))
    neurons = torch.rand(LAYERS, FFN, generator=draw, dtype=torch.float64)
    return replace(empty, mass=mass, output=output, neurons=neurons)


@pytest.fixture(scope="module")
def found(mha: Any) -> Statistics:
    return statistics(mha)


@pytest.fixture
def file(found: Statistics, tmp_path: Path) -> str:
    found.save(tmp_path / "stats.safetensors")
    return str(tmp_path / "stats.safetensors")


def exempt(mask: torch.Tensor, layers: int = 2) -> torch.Tensor:
    mask = mask.clone()
    mask[:layers] = True
    return mask


def best(scores: torch.Tensor, count: int) -> torch.Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, scores.topk(count).indices, True)


@pytest.mark.parametrize("rho", ["mass", "output"])
@pytest.mark.parametrize(("alpha", "vote"), [(0.1, 0.4), (0.08, 0.8)])
def test_heads_above_alpha_in_enough_samples_stay(
    mha: Any, found: Statistics, file: str, rho: Any, alpha: float, vote: float
) -> None:
    votes = (getattr(found, rho) > alpha).sum(0)
    mask = exempt(votes > vote * SAMPLES)
    assert not mask.all() and mask[2:].any()
    check_pass(mha, [DropVisualHeads(alpha=alpha, vote=vote, rho=rho, stats=file)], Masks(heads=mask), FEW)


def test_heads_of_grouped_keys_by_alpha(gqa: Any, tmp_path: Path) -> None:
    found = statistics(gqa)
    found.save(tmp_path / "x.safetensors")
    mask = (found.mass > 0.1).sum(0) > 2
    one = DropVisualHeads(alpha=0.1, from_layer=0, stats=str(tmp_path / "x.safetensors"))
    check_pass(gqa, [one], Masks(heads=mask))


@pytest.mark.parametrize("rho", ["mass", "output"])
def test_the_most_active_heads_of_each_layer_stay(mha: Any, found: Statistics, file: str, rho: Any) -> None:
    means = getattr(found, rho).mean(0)
    mask = exempt(torch.stack([best(row, 2) for row in means]))
    check_pass(mha, [DropVisualHeads(keep=2, rho=rho, stats=file)], Masks(heads=mask), FEW)


@pytest.mark.parametrize(("keep", "count"), [(2, 2 * 3), (0.4, 4)])
def test_on_average_over_layers_the_most_active_heads_stay(
    mha: Any, found: Statistics, file: str, keep: float, count: int
) -> None:
    scores = found.mass.mean(0)[1:]
    mask = torch.cat([torch.ones(1, HEADS, dtype=torch.bool), best(scores.flatten(), count).view_as(scores)])
    assert len({int(row.sum()) for row in mask[1:]}) > 1
    one = DropVisualHeads(keep=keep, average=True, from_layer=1, stats=file)
    optimized = check_pass(mha, [one], Masks(heads=mask), FEW)
    (note,) = optimized.program.passes[0].notes
    assert "mean mass ratio over 5 samples" in note


def test_neurons_by_activity(mha: Any, found: Statistics, file: str) -> None:
    mask = torch.stack([best(row, FFN // 4) for row in found.neurons])
    check_pass(mha, [DropVisualNeurons(0.25, select="activity", stats=file)], Masks(neurons=mask), FEW)


@pytest.mark.slow
def test_the_first_layer_whose_cut_moves_the_prediction_little_enough(mha: Any, found: Statistics, file: str) -> None:
    found = replace(found, cut_kl=SAMPLES * torch.tensor([0.5, 0.004, 0.002, 0.0], dtype=torch.float64))
    found.save(Path(file))
    check_pass(mha, [CutVisual("auto", floor=0, stats=file)], Masks(cut_from=2), [{}])
    assert optimize(mha, "cut-visual{from_layer=auto,eta=0.004,floor=1}", found).report()
    for text, first in (("{from_layer=auto,eta=0.004,floor=1}", 1), ("{from_layer=auto,eta=0.01,floor=3}", 3)):
        note = optimize(mha, f"cut-visual{text}", found).program.passes[0].notes[0]
        assert f"layer{'s' if first < 3 else ''} {first}" in note
    with pytest.warns(FoveateWarning, match="no cut from layer 1 on moves .* eta=0; the least is 0.1"):
        optimize(mha, "cut-visual{from_layer=auto,eta=0,floor=1}", replace(found, cut_kl=found.cut_kl + 0.5))
    with pytest.warns(FoveateWarning, match="the model has 4 layers, none from floor=5 on"):
        optimize(mha, "cut-visual{from_layer=auto}", found)
    with pytest.raises(PassError, match="it belongs to from_layer=auto"):
        CutVisual(2, stats=file)
    with pytest.raises(PassError, match="from_layer=auto needs statistics"):
        optimize(mha, [CutVisual("auto")])


def test_a_pipeline_s_calibration_is_used_where_a_pass_has_no_file_of_its_own(
    mha: Any, found: Statistics, file: str, tmp_path: Path
) -> None:
    other = replace(found, mass=0.2 - found.mass, neurons=-found.neurons)

    def logits(passes: Any, calibration: Any = None) -> torch.Tensor:
        with torch.inference_mode():
            return optimize(mha, passes, calibration)(**random_inputs(mha)).logits

    for text in (
        "drop-visual-heads{alpha=0.1%s}",
        "drop-visual-heads{keep=2%s}",
        "drop-visual-neurons{select=activity%s}",
    ):
        mine, given = text % f",stats={file}", text % ""
        expected = logits(mine)
        assert torch.equal(logits(given, found), expected)
        assert torch.equal(logits(given, file), expected)
        assert torch.equal(logits(mine, other), expected)
        assert not torch.allclose(logits(given, other), expected, atol=1e-4)
    weights = logits("drop-visual-heads{keep=2}")
    assert torch.equal(logits("drop-visual-heads{keep=2,scores=weight-norm}", found), weights)
    assert not torch.allclose(logits("drop-visual-heads{keep=2}", found), weights, atol=1e-4)


@pytest.mark.slow
def test_passes_without_statistics_say_what_is_missing(mha: Any, found: Statistics, file: str) -> None:
    for one, message in (
        (DropVisualHeads(alpha=0.1), "alpha=0.1 needs statistics: make them with `foveate calibrate`"),
        (DropVisualHeads(keep=1, scores="activity"), "scores=activity needs statistics"),
        (DropVisualNeurons(select="activity"), "select=activity needs statistics"),
    ):
        with pytest.raises(PassError, match=message):
            optimize(mha, [one])
    with pytest.raises(ArtifactError, match=r"statistics gone.safetensors cannot be read: there is no such file"):
        optimize(mha, [DropVisualHeads(alpha=0.1, stats="gone.safetensors")])
    with pytest.raises(PassError, match="of a model with heads=4, this one has heads=2; calibrate this model"):
        small = foveate.models.random.random_llava(heads=2, ffn=FFN)
        foveate.optimize(small, DropVisualHeads(alpha=0.1), found)
    with pytest.raises(PassError, match="statistics are of no sample"):
        optimize(mha, DropVisualHeads(alpha=0.1), Statistics.empty(traced(mha).info))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of keep, alpha and mask; none was given"),
        ({"keep": 1, "alpha": 0.1}, "keep and alpha was given"),
        ({"alpha": -1}, "alpha=-1; allowed: a ratio, 0 or more"),
        ({"alpha": 0.1, "vote": 1}, "vote=1; allowed"),
        ({"alpha": 0.1, "rho": "norm"}, "allowed: mass, output"),
        ({"alpha": 0.1, "average": True}, "average has no meaning here; it belongs to keep"),
        ({"alpha": 0.1, "scores": "activity"}, "scores has no meaning here"),
        ({"keep": 1, "scores": "weight-norm", "stats": "x"}, "stats has no meaning here"),
        ({"keep": 1, "scores": "nonsense"}, "allowed: activity, weight-norm"),
        ({"keep": 1, "stats": 3}, "stats=3; allowed: a file"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        DropVisualHeads(**options)


def test_stats_of_neurons_need_select_activity() -> None:
    with pytest.raises(PassError, match="it belongs to select=activity"):
        DropVisualNeurons(stats="x")


def test_nothing_to_drop_is_said(mha: Any, found: Statistics) -> None:
    with pytest.warns(FoveateWarning, match="has a head to drop"):
        optimize(mha, "drop-visual-heads{alpha=0}", replace(found, mass=found.mass + 1))
