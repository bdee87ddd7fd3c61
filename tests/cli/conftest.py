"""A small model in a folder, as a user has one, and a way to run the command line in-process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import LlavaForConditionalGeneration

from foveate.cli.main import cli
from foveate.models.digits import samples
from foveate.models.digits.architecture import build_config
from foveate.models.digits.processing import build_processor
from foveate.models.digits.saving import save_folder

Run = Callable[..., Result]

LAYERS = 2


@pytest.fixture(scope="session")
def run() -> Run:
    """Runs `foveate ...` and gives exit code, stdout and stderr."""

    def invoke(*args: object) -> Result:
        return CliRunner().invoke(cli, [str(arg) for arg in args])

    return invoke


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A digits model with two layers that was never trained, with its processor."""
    processor = build_processor()
    config = build_config(processor.tokenizer)
    config.text_config.num_hidden_layers = LAYERS
    config.vision_config.num_hidden_layers = 2
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(LlavaForConditionalGeneration(config).eval(), processor, path)
    return path


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG of a digit grid."""
    path = tmp_path_factory.mktemp("image") / "grid.png"
    samples(n=1, seed=3)[0].image.save(path)
    return path


@pytest.fixture(scope="session")
def saved(run: Run, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model, optimized and saved by the command line."""
    path = tmp_path_factory.mktemp("saved") / "fast"
    result = run("optimize", folder, "--passes", "fastv{layer=1,keep=0.5}", "-o", path)
    assert result.exit_code == 0, result.stderr
    return path


def said_in(result: Result) -> list[str]:
    """Lines on stderr, but for those that tell of progress, as a slow machine makes them."""
    return [line for line in result.stderr.splitlines() if not line.endswith("...")]
