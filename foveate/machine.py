"""What the machine at hand reaches: the figures of a roofline, measured in a few seconds; and a steady clock."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import torch

import foveate.kernels  # noqa: F401  registers what the ops compute
from foveate import __version__, ops
from foveate.ir.cost.devices import Device

WARMUPS = 2
"""Untimed calls: the first compiles or fills caches, the second settles."""

HEAD = 64
"""Head size of the attention that is measured."""


def calibrate(rows: int = 640, width: int = 2816, inner: int = 1024, seconds: float = 2.0) -> Device:
    """A device file's figures for this CPU at the thread count of the moment, in fp32; takes about `seconds`.

    Rate: a GEMM [rows, inner] x [inner, width]. Attention: a causal call over `rows` tokens. Bandwidth: copying
    memory that no cache holds. Shortest op: adding two small tensors in a graph's eager run.
    """
    each = seconds / 4
    a, weight = torch.randn(rows, inner), torch.randn(width, inner)
    source = torch.empty(32 * 2**20)
    target, small = torch.empty_like(source), torch.randn(8, 8)
    heads = max(1, inner // HEAD)
    q = torch.randn(1, heads, rows, HEAD)
    order = torch.arange(rows)[None]
    with torch.inference_mode():
        rate = 2 * rows * width * inner / median_of(lambda: torch.nn.functional.linear(a, weight), each)
        pairs = rows * (rows + 1) // 2 if rows > ops.FEW_QUERIES else rows * rows
        args = ([q[:, :, :-1], q[:, :, -1:]], [q[:, :, :-1], q[:, :, -1:]], [q[:, :, :-1], q[:, :, -1:]])
        orders = ([order[:, :-1], order[:, -1:]],) * 2
        attend = median_of(lambda: ops.attention(*args, *orders, 0, "vt:vt", 0.125), each)
        copy = median_of(lambda: target.copy_(source), each)
        short = median_of(lambda: [small + small for _ in range(50)], each) / 50
    threads = torch.get_num_threads()
    return Device(
        name=f"this CPU, {threads} thread{'s' * (threads != 1)}, fp32, measured",
        flops_per_s={"float32": rate},
        bytes_per_s=2 * source.nbytes / copy,
        op_s=short,
        attention=min(1.0, 4 * heads * HEAD * pairs / attend / rate),
        fused=False,
        about=f"{cpu_name()}; measured by foveate {__version__} with torch {torch.__version__}",
    )


def median_of(call: Callable[[], Any], seconds: float) -> float:
    """Median time of a call, repeated for so long, at least three times."""
    for _ in range(WARMUPS):
        call()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        times.append(timed(call)[1])
    return statistics.median(times)


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """A call's result, and the seconds it took, with the work of an accelerator done."""
    _wait()
    start = time.perf_counter()
    result = call()
    _wait()
    return result, time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Run with that many threads (None: as many as there were), then put the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def environment() -> dict[str, Any]:
    """Versions and machine, as a result file needs them."""
    return {
        "foveate": __version__,
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
    }


def cpu_name() -> str:
    """The processor as it calls itself."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123  a pseudo file
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
