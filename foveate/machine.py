"""What the machine at hand reaches: the figures of a roofline, measured in a few seconds; and a steady clock."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

import foveate.kernels  # noqa: F401  registers what the ops compute
from foveate import __version__, ops
from foveate.ir.cost import cost_of
from foveate.ir.cost.devices import Device
from foveate.kernels.linear import linear
from foveate.kernels.processor import cpu_name

WARMUPS = 2
"""Untimed calls: the first compiles or fills caches, the second settles."""

HEAD = 64
"""Head size of the attention that is measured."""

SMALL: dict[str, Any] = {"layers": 4, "hidden": 512, "heads": 8, "ffn": 1408, "visual_tokens": 144}
TEXT = 32
"""A model that is small, but whose ops still run on all threads."""


def calibrate(rows: int = 640, width: int = 2816, inner: int = 1024, seconds: float = 2.0) -> Device:
    """A device file's figures for this CPU at the thread count of the moment, in fp32; takes `seconds` and a few more.

    Rate: a GEMM [rows, inner] x [inner, width]. Attention: a causal call over `rows` tokens. Bandwidth: copying
    64 MiB. What each op takes besides: what is left of a small model's run, shared out among its ops.
    """
    each = seconds / 4
    a, weight = torch.randn(rows, inner), torch.randn(width, inner)
    source = torch.empty(16 * 2**20)
    target = torch.empty_like(source)
    heads = max(1, inner // HEAD)
    q = torch.randn(1, heads, rows, HEAD)
    order = torch.arange(rows)[None]
    with torch.inference_mode():
        rate = 2 * rows * width * inner / median_of(lambda: linear(a, weight), each)
        pairs = rows * (rows + 1) // 2 if rows > ops.FEW_QUERIES else rows * rows
        streams = [q[:, :, :-1], q[:, :, -1:]]
        orders = [order[:, :-1], order[:, -1:]]
        attend = median_of(lambda: ops.attention(streams, streams, streams, orders, orders, 0, "vt:vt", 0.125), each)
        copy = median_of(lambda: target.copy_(source), each)
    threads = torch.get_num_threads()
    device = Device(
        name=f"this CPU, {threads} thread{'s' * (threads != 1)}, fp32, measured",
        flops_per_s={"float32": rate},
        bytes_per_s=2 * source.nbytes / copy,
        attention=min(1.0, 4 * heads * HEAD * pairs / attend / rate),
        fused=False,
        about=f"{cpu_name()}; measured by foveate {__version__} with torch {torch.__version__}",
    )
    return replace(device, op_s=_overhead(device, each))


def _overhead(device: Device, seconds: float) -> float:
    """What each op of a small model takes that its arithmetic and memory traffic do not explain, in seconds."""
    from foveate.api import optimize
    from foveate.models.random import random_inputs, random_llava

    source = random_llava(**SMALL, vision_layers=2, vision_hidden=32, vision_heads=2)
    model = optimize(source)
    inputs = random_inputs(source, text_tokens=TEXT)
    with torch.inference_mode():
        measured = median_of(lambda: model(**inputs), seconds)
    explained, counted = (
        cost_of(model.program, text_tokens=TEXT, prefix_tokens=3, device=replace(device, op_s=op_s)).first_token_s
        for op_s in (0.0, 1.0)
    )
    return max(0.0, (measured - explained) / (counted - explained))


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
