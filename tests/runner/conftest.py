"""Exported packages of a small model, each made once and changed by nobody."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import foveate
from foveate.runner import NumpyModel
from tests.ir.programs import optimized

Packaged = Callable[[str], Path]


@pytest.fixture(scope="session")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    """Pipeline -> the folder of a package."""

    @cache
    def made(pipeline: str) -> Path:
        folder = tmp_path_factory.mktemp("packages") / "out"
        foveate.export(optimized(pipeline), output=folder, verify=False)
        return folder

    return made


@pytest.fixture(scope="session")
def plain(packaged: Packaged) -> NumpyModel:
    """A package without passes, over numpy arrays."""
    return foveate.load(packaged(""), tensors="np")


def arrays(inputs: dict[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
    """The same inputs in numpy."""
    return {name: value.numpy() for name, value in inputs.items()}
