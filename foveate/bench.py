"""Time a model before and after, in one process, round robin, medians; and what this machine reaches."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from foveate import __version__
from foveate.api import cost, optimize
from foveate.backends.base import BACKENDS
from foveate.errors import InputError
from foveate.evaluate import Tick, silent
from foveate.ir.cost import Cost, Device
from foveate.models.random import random_inputs
from foveate.passes.pipeline import Passes, pipeline_text, resolve

Inputs = Mapping[str, Tensor]

WARMUPS = 2
"""Untimed rounds: the first compiles or fills caches, the second settles."""


@dataclass
class Timing:
    """Times of one model, in seconds: each prefill, and each decode step with a filled cache."""

    prefills: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)

    @property
    def prefill_s(self) -> float:
        """Median time of a whole call on the prompts: vision, decoder, selection, cache."""
        return statistics.median(self.prefills)

    @property
    def decode_s(self) -> float:
        """Median time of one decode step."""
        return statistics.median(self.steps)

    def to_json(self) -> dict[str, Any]:
        """Medians, and every prefill so that noise can be seen."""
        return {"prefill_s": self.prefill_s, "decode_s": self.decode_s, "prefills_s": self.prefills}


@dataclass(frozen=True)
class Bench:
    """An optimized model against its dense form on the same backend, and against Hugging Face with SDPA."""

    setting: dict[str, Any]
    times: dict[str, Timing]
    costs: dict[str, Cost]
    vision_s: float
    dense_error: float

    @property
    def flop_speedup(self) -> float:
        """FLOPs of the dense vision and prefill graphs over those of the optimized ones."""
        return work(self.costs["dense"]) / work(self.costs["optimized"])

    def speedup(self, phase: str, base: str = "dense") -> float:
        """Measured time of `base` over the optimized model's; phase: `prefill` or `decode`."""
        before, after = (getattr(self.times[name], f"{phase}_s") for name in (base, "optimized"))
        return float(before / after)

    def losses(self) -> list[str]:
        """Where the optimized model is slower, in words."""
        return [
            f"{phase} is slower than {'Hugging Face' if base == 'hf' else base}: {self.speedup(phase, base):.2f}x"
            for base in ("dense", "hf")
            for phase in ("prefill", "decode")
            if self.speedup(phase, base) < 1
        ]

    def to_json(self) -> dict[str, Any]:
        """Everything; `efficiency` is the measured over the FLOP speed-up."""
        timed = {name: timing.to_json() for name, timing in self.times.items()}
        for name, spent in self.costs.items():
            timed[name] |= {
                "flops": work(spent),
                "decode_flops": spent.decode.flops,
                "kv_bytes": spent.kv_bytes,
            }
        prefill = {base: self.speedup("prefill", base) for base in ("dense", "hf")}
        return {
            **self.setting,
            "flop_speedup": self.flop_speedup,
            "prefill_speedup": prefill["dense"],
            "decode_speedup": self.speedup("decode"),
            "prefill_speedup_vs_hf": prefill["hf"],
            "decode_speedup_vs_hf": self.speedup("decode", "hf"),
            "efficiency": prefill["dense"] / self.flop_speedup,
            "efficiency_vs_hf": prefill["hf"] / self.flop_speedup,
            "vision_s": self.vision_s,
            "dense_error": self.dense_error,
            "slower": self.losses(),
            **timed,
        }


def work(spent: Cost) -> int:
    """FLOPs of what a prefill call runs: vision and prefill."""
    return int(spent.vision.flops + spent.prefill.flops)


def bench(
    model: Any,
    passes: Passes | None,
    *,
    backend: str = "eager",
    text_tokens: int = 64,
    batch: int = 1,
    threads: int | None = None,
    repeat: int = 7,
    new_tokens: int = 16,
    tick: Tick = silent,
) -> Bench:
    """Measure a supported model on random prompts of one image each; the thread count is set and put back.

    Raises FoveateError subclasses for passes that do not fit, or sizes that the model does not take.
    """
    chosen = resolve(passes)
    inputs = _inputs(model, text_tokens, batch, new_tokens)
    with thread_count(threads), torch.inference_mode():
        tick("tracing and optimizing", 0, 2)
        dense = optimize(model, backend=backend)
        tick("tracing and optimizing", 1, 2)
        optimized = optimize(model, chosen, backend=backend)
        tick("tracing and optimizing", 2, 2)
        contenders = {"dense": dense, "optimized": optimized, "hf": model}
        with sdpa(model):
            error = (dense(**inputs).logits - model(**inputs, logits_to_keep=1).logits).abs().max().item()
            times = measure(contenders, inputs, repeat, new_tokens, tick)
        vision_s = time_vision(dense.program, backend, inputs["pixel_values"], repeat)
        setting = {
            "passes": pipeline_text(chosen),
            "backend": backend,
            "dtype": str(model.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "batch": batch,
            "visual_tokens": dense.program.info.tokens_per_image,
            "text_tokens": text_tokens,
            "repeat": repeat,
            "new_tokens": new_tokens,
            "environment": environment(),
        }
    costs = {
        name: cost(opt.program, text_tokens=text_tokens, batch=batch)
        for name, opt in (("dense", dense), ("optimized", optimized))
    }
    return Bench(setting, times, costs, vision_s, error)


def measure(
    contenders: Mapping[str, Any], inputs: Inputs, repeat: int, new_tokens: int, tick: Tick = silent
) -> dict[str, Timing]:
    """Times of models that take the same inputs, in turn in each round, another one first each time."""
    times = {name: Timing() for name in contenders}
    order = list(contenders)
    for round_ in range(-WARMUPS, repeat):
        label = "warming up" if round_ < 0 else "measuring"
        tick(label, round_ + WARMUPS if round_ < 0 else round_, WARMUPS if round_ < 0 else repeat)
        first = round_ % len(order)
        for name in order[first:] + order[:first]:
            prefill, steps = _one(contenders[name], inputs, new_tokens)
            if round_ >= 0:
                times[name].prefills.append(prefill)
                times[name].steps += steps
    tick("measuring", repeat, repeat)
    return times


def _one(model: Any, inputs: Inputs, new_tokens: int) -> tuple[float, list[float]]:
    """Seconds of one prefill, and of each of the decode steps behind it."""
    out, prefill = _timed(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
    token = inputs["input_ids"][:, -1:]
    steps = []
    for _ in range(new_tokens):
        cache = out.past_key_values
        out, spent = _timed(partial(model, input_ids=token, past_key_values=cache, use_cache=True))
        steps.append(spent)
    return prefill, steps


def time_vision(program: Any, backend: str, pixels: Tensor, repeat: int) -> float:
    """Median time of the vision graph alone, in seconds."""
    run = import_module(BACKENDS[backend]).lower(program, program.graphs["vision"], "vision")
    times = [_timed(lambda: run({"pixel_values": pixels}))[1] for _ in range(WARMUPS + repeat)]
    return statistics.median(times[WARMUPS:])


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    _wait()
    start = time.perf_counter()
    result = call()
    _wait()
    return result, time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _inputs(model: Any, text_tokens: int, batch: int, new_tokens: int) -> dict[str, Tensor]:
    try:
        inputs = random_inputs(model, batch=batch, text_tokens=text_tokens)
    except ValueError as error:
        raise InputError(str(error)) from None
    length, longest = inputs["input_ids"].shape[1], model.config.text_config.max_position_embeddings
    if length + new_tokens > longest:
        raise InputError(
            f"a prompt of {length} tokens and {new_tokens} new ones make {length + new_tokens}; "
            f"this model takes {longest}"
        )
    return inputs


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Run with that many threads (None: as many as there were), then put the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def sdpa(model: Any) -> Iterator[None]:
    """A transformers model with SDPA attention, then with what it had."""
    before = model.config._attn_implementation
    if before == "sdpa":
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def calibrate(rows: int = 640, width: int = 1024, inner: int = 1024, seconds: float = 1.0) -> Device:
    """What this machine reaches on an fp32 GEMM of that shape, and on copying memory; takes `seconds`."""
    a, b = torch.randn(rows, inner), torch.randn(inner, width)
    source = torch.empty(32 * 2**20)
    target = torch.empty_like(source)
    gemm = _median_of(lambda: torch.mm(a, b), seconds / 2)
    copy = _median_of(lambda: target.copy_(source), seconds / 2)
    threads = torch.get_num_threads()
    return Device(
        name=f"this CPU, {threads} thread{'s' * (threads != 1)}, fp32, measured",
        flops_per_s=2 * rows * width * inner / gemm,
        bytes_per_s=2 * source.nbytes / copy,
    )


def _median_of(call: Callable[[], Any], seconds: float) -> float:
    for _ in range(WARMUPS):
        call()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        times.append(_timed(call)[1])
    return statistics.median(times)


def environment() -> dict[str, Any]:
    """Versions and machine, as a result file needs them."""
    return {
        "foveate": __version__,
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123  a pseudo file
            return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
