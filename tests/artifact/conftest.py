from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from foveate import artifact
from foveate.model import OptimizedModel
from tests.ir.programs import optimized

SMALL = ("drop-visual-heads{keep=2,from_layer=0},fastv{layer=1,keep=0.5}", 2, 2)
"""Pipeline, key heads and layers of the program that is damaged in many ways."""


def saved(opt: OptimizedModel, folder: Path) -> Path:
    opt.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved program that nobody changes."""
    return saved(optimized(*SMALL), tmp_path_factory.mktemp("whole") / "saved")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    """A saved program to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def manifest_of(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / artifact.MANIFEST).read_text(encoding="utf-8"))
    return content
