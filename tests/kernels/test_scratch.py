"""Memory that threads keep: one piece a name and thread, as large as it was ever asked for."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor

from foveate.kernels import linear as linears
from foveate.kernels import scratch as module
from foveate.kernels.scratch import scratch

LIKE = torch.empty(0)


def test_a_name_has_one_piece_of_memory() -> None:
    first = scratch("test one", (3, 4), LIKE)
    assert (first.shape, first.dtype) == ((3, 4), torch.float32)
    assert scratch("test one", (2, 5), LIKE).data_ptr() == first.data_ptr()
    assert scratch("test other", (3, 4), LIKE).data_ptr() != first.data_ptr()


def test_it_grows_and_takes_other_dtypes() -> None:
    small = scratch("test grows", (4,), LIKE)
    large = scratch("test grows", (5, 1000), LIKE.double())
    large.fill_(1)
    assert (large.shape, large.dtype) == ((5, 1000), torch.float64)
    assert scratch("test grows", (4,), LIKE).data_ptr() == large.data_ptr() != small.data_ptr()


def test_what_is_very_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 64)
    kept = scratch("test large", (16,), LIKE)
    assert scratch("test large", (17,), LIKE).shape == (17,)
    assert scratch("test large", (16,), LIKE).data_ptr() == kept.data_ptr()


def test_memory_from_inference_mode_serves_outside_of_it() -> None:
    with torch.inference_mode():
        scratch("test modes", (8,), LIKE).fill_(1)
    weight = torch.randn(8, requires_grad=True)
    (scratch("test modes", (8,), LIKE).fill_(2) * weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [2] * 8


def test_it_is_on_the_cpu_whatever_the_default_is() -> None:
    with torch.device("meta"):
        made = scratch("test device", (8,), LIKE)
    assert made.device.type == "cpu"


def test_each_thread_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linears, "pays", lambda: torch.backends.mkldnn.is_available())
    together = Barrier(2)

    def work(seed: int) -> tuple[int, float]:
        generator = torch.Generator().manual_seed(seed)
        x, weight = (torch.randn(shape, generator=generator) for shape in ((64, 256), (1024, 512)))
        expected = x @ weight[:, :256].t()
        worst = 0.0
        with torch.inference_mode():
            for _ in range(20):
                together.wait()
                found: Tensor = linears.linear(x, weight[:, :256])
                worst = max(worst, float((found - expected).abs().max()))
        return scratch("weight", (1,), LIKE).data_ptr(), worst

    with ThreadPoolExecutor(2) as pool:
        (one, first), (other, second) = pool.map(work, (1, 2))
    assert one != other
    assert max(first, second) < 1e-3
