"""Time a model before and after, in one process, round robin, medians."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from foveate.api import cost, optimize
from foveate.backends.base import BACKENDS
from foveate.errors import InputError
from foveate.evaluate import Tick, silent
from foveate.generation import CACHE
from foveate.ir.cost import Cost
from foveate.machine import WARMUPS, environment, thread_count, timed
from foveate.models.random import random_inputs
from foveate.passes.pipeline import Passes, pipeline_text, resolve

Inputs = Mapping[str, Tensor]


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
        return self.costs["dense"].first_token_flops / self.costs["optimized"].first_token_flops

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
                "flops": spent.first_token_flops,
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
    """Times of models that take the same inputs, in turn in each round, another one first each time.

    Before each prefill that is timed the same model runs one that is not.
    """
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
    run = partial(model, **inputs, use_cache=True, logits_to_keep=1)
    # Another model leaves other weights in the caches, and memory that is given back during the next call.
    run()
    out, prefill = timed(run)
    token = inputs["input_ids"][:, -1:]
    steps = []
    for _ in range(new_tokens):
        cache = {CACHE: getattr(out, CACHE)}
        out, spent = timed(partial(model, input_ids=token, use_cache=True, **cache))
        steps.append(spent)
    return prefill, steps


def time_vision(program: Any, backend: str, pixels: Tensor, repeat: int) -> float:
    """Median time of the vision graph alone, in seconds."""
    run = import_module(BACKENDS[backend]).lower(program, program.graphs["vision"], "vision")
    times = [timed(lambda: run({"pixel_values": pixels}))[1] for _ in range(WARMUPS + repeat)]
    return statistics.median(times[WARMUPS:])


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
