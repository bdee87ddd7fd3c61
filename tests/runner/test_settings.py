"""How answers are written: what is asked for, what `generation_config.json` says, and what is drawn from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from foveate.errors import ArtifactError, BackendError, InputError
from foveate.runner.choosing import Chooser, probabilities
from foveate.runner.settings import Settings


def written(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_a_generation_config_is_read_as_transformers_does(tmp_path: Path) -> None:
    content = {
        "_from_model_config": True,
        "transformers_version": "5.23.0",
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "do_sample": True,
        "temperature": 0.7,
        "top_p": 0.9,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "max_length": 30,
    }
    found = Settings.read(written(tmp_path / "g.json", content))
    assert found == Settings(eos_token_id=(2, 3), do_sample=True, temperature=0.7, top_p=0.9, max_length=30)
    assert (found.padding, found.new_tokens(12), found.new_tokens(40)) == (2, 18, 1)
    assert found.given({"max_new_tokens": 5, "pad_token_id": 0, "eos_token_id": 7}).new_tokens(12) == 5
    assert found.given({"eos_token_id": 7}).padding == 7
    assert Settings().new_tokens(12) == 20


@pytest.mark.parametrize("content", ["", "[1]", '"text"', "{", '{"a": 1}{'])
def test_a_damaged_generation_config_is_one_error(content: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"g\.json is damaged"):
        Settings.read(written(tmp_path / "g.json", content))


@pytest.mark.parametrize("content", [{"num_beams": 4}, {"repetition_penalty": 1.2}, {"min_new_tokens": 1}])
def test_a_generation_config_that_asks_for_more_is_refused(content: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=rf"g\.json: {next(iter(content))} is not heeded.*without tensors='np'"):
        Settings.read(written(tmp_path / "g.json", content))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("do_sample", "yes"),
        ("temperature", 0),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.5),
        ("eos_token_id", [2, "end"]),
        ("eos_token_id", 2.5),
        ("pad_token_id", -1),
        ("seed", "x"),
    ],
)
def test_settings_that_make_no_sense(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"{name} is .*; it must be"):
        Settings().given({name: value})


def test_options_that_are_not_done_here() -> None:
    for name, value in (("num_beams", 2), ("logits_processor", object()), ("labels", np.zeros(2)), ("nonsense", 3)):
        with pytest.raises(InputError, match=f"{name} is not heeded"):
            Settings().given({name: value})
    assert Settings().given({"num_beams": 1, "use_cache": True, "stop_strings": None}) == Settings()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 50, 1.0), (0.5, 7, 1.0), (1.3, 0, 0.8), (0.9, 11, 0.6), (2.0, 500, 0.01)]
)
def test_what_is_drawn_from_is_what_transformers_draws_from(temperature: float, top_k: int, top_p: float) -> None:
    logits = torch.randn(5, 60, generator=torch.Generator().manual_seed(0)).double() * 3
    warpers: list[Any] = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    scores = logits
    for warper in warpers:
        scores = warper(None, scores)
    found = probabilities(logits.numpy(), Settings(temperature=temperature, top_k=top_k, top_p=top_p))
    np.testing.assert_allclose(found, scores.softmax(1).numpy(), rtol=1e-9, atol=1e-12)


def test_draws_are_as_frequent_as_they_should_be_and_a_seed_repeats_them() -> None:
    logits = np.tile(np.log([0.5, 0.3, 0.15, 0.05]), (40_000, 1))
    settings = Settings(do_sample=True, top_k=3, seed=1)
    found = Chooser(settings)(logits)
    shares = np.bincount(found, minlength=4) / len(found)
    np.testing.assert_allclose(shares, [0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], atol=0.01)
    assert shares[3] == 0
    assert np.array_equal(found, Chooser(settings)(logits))
    assert not np.array_equal(found, Chooser(settings.given({"seed": 2}))(logits))


def test_greedily_the_first_of_the_best_is_taken() -> None:
    assert Chooser(Settings())(np.array([[0, 2, 2], [5, 1, 0]])).tolist() == [1, 0]
