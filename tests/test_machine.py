"""What is measured of a machine is plausible, and a forecast takes it."""

from __future__ import annotations

import pytest
import torch

from foveate.ir.cost import cost_of
from foveate.machine import calibrate, environment, median_of, thread_count
from tests.ir.programs import traced


@pytest.mark.slow
def test_calibration_finds_plausible_rates() -> None:
    device = calibrate(64, 64, 64, seconds=0.1)
    assert 1e6 < device.flops_per_s["float32"] < 1e15
    assert 1e8 < device.bytes_per_s < 1e14
    assert 0 <= device.op_s < 1e-2, "a rate this small may explain all of a model's time"
    assert 0 < device.attention <= 1
    assert cost_of(traced()[1], device=device).prefill.time_s > 0


def test_calibration_at_a_single_row() -> None:
    assert calibrate(1, 8, 8, seconds=0.01).attention > 0


@pytest.mark.slow
def test_the_thread_count_is_put_back() -> None:
    before = torch.get_num_threads()
    with thread_count(before + 1):
        assert torch.get_num_threads() == before + 1
        assert f"{before + 1} threads" in calibrate(8, 8, 8, seconds=0.01).name
    assert torch.get_num_threads() == before


def test_a_median_needs_three_calls() -> None:
    calls: list[int] = []
    assert median_of(lambda: calls.append(1), 0) >= 0
    assert len(calls) == 5


def test_the_environment_names_versions() -> None:
    assert set(environment()) == {"foveate", "torch", "transformers", "python", "cpu", "cpus"}
