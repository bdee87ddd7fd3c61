"""The Triton kernels in Triton's interpreter, case by case, against a dense oracle in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from tests.kernels.neighbor import triton_cases

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
TOLERANCE = {"float32": 1e-5, "float16": 4e-3}


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, dict[str, float]]]:
    """Errors of all cases, from one process."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", triton_cases.__name__]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", triton_cases.FORWARD)
def test_forward_equals_the_oracle(name: str, errors) -> None:
    worst = errors["forward"][name]
    assert max(worst.values()) <= TOLERANCE[triton_cases.FORWARD[name].dtype], worst


@pytest.mark.parametrize("name", triton_cases.BACKWARD)
def test_backward_equals_autograd_of_the_oracle(name: str, errors) -> None:
    worst = errors["backward"][name]
    assert max(worst.values()) <= 1e-5, worst
