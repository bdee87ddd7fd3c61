"""Milliseconds on a GPU: whole models at real shapes, and the neighbour attention kernels, in one command.

    python benchmarks/gpu.py                 # on a GPU: under nine minutes, random weights, no network
    python benchmarks/gpu.py --quick -o DIR  # small shapes, on a CPU too: proves that it works

Time to first token (vision tower included), decode time a token, as ops and as a CUDA graph, and peak memory of Hugging
Face (SDPA), the dense program and each recipe, eager and compiled, at several batch sizes; before that the kernels
against dense SDPA, FlexAttention and the time that reading and writing alone would take, and projections of the same
tokens as one matmul or as several. What does not fit into --minutes is left out and said so. Results are written after
every block.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_page import markdown
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from writing import RESULTS, replace

import foveate
from foveate import ops
from foveate.bench import Timing, measure, sdpa
from foveate.ir.cost.devices import devices
from foveate.kernels.neighbor import triton_launch
from foveate.kernels.neighbor.dispatch import planned
from foveate.kernels.neighbor.triton_support import available
from foveate.machine import environment, median_of, timed
from foveate.models.random import random_inputs, random_llava

TOWER = {"vision_layers": 24, "vision_hidden": 1024, "vision_heads": 16, "visual_tokens": 576, "vocab": 32000}
SHAPES = {
    "LLaVA-1.5-7B": {"layers": 32, "hidden": 4096, "heads": 32, "ffn": 11008, **TOWER},
    # The decoder of Qwen2-VL-7B behind the same tower: its own is not run yet.
    "Qwen2-VL-7B decoder": {"layers": 28, "hidden": 3584, "heads": 28, "kv_heads": 4, "ffn": 18944, **TOWER},
    "LLaVA-1.5-13B": {"layers": 40, "hidden": 5120, "heads": 40, "ffn": 13824, **TOWER},
}
QUICK = {"small": {"layers": 3, "hidden": 64, "heads": 4, "ffn": 128, "visual_tokens": 16}}
RECIPES = ("yopo-25", "yopo-12", "fastv-50")
BATCHES = (1, 8, 32)
BACKENDS = ("eager", "inductor")
TEXT = 64
KERNELS = [
    ((heads, kv_heads), side, radius)
    for side in (24, 48, 64, 128)
    for heads, kv_heads in ((28, 4), (32, 32))
    for radius in (2, 5)
]
SIZE = 128
PROJECTIONS = {
    "LLaVA-1.5-7B": (4096, [4096] * 3, [11008] * 2),
    "Qwen2-VL-7B": (3584, [3584, 512, 512], [18944] * 2),
}
"""Hidden size, rows of q, k, v, and of gate, up."""


@dataclass
class Run:
    """What is measured, how much time is left, and where it goes."""

    device: torch.device
    quick: bool
    folder: Path
    deadline: float
    models: list[dict[str, Any]] = field(default_factory=list)
    kernels: list[dict[str, Any]] = field(default_factory=list)
    projections: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def fits(self, what: str, seconds: float) -> bool:
        """Whether there is time for something that takes about so long; what is left out is remembered."""
        fits = time.monotonic() + seconds < self.deadline
        if not fits:
            self.left_out.append(what)
            print(f"no time left for {what}", flush=True)
        return fits

    def write(self) -> None:
        """JSON with every figure, Markdown with the tables."""
        about = {**environment(), "device": device_name(self.device), "quick": self.quick}
        tables = {"models": self.models, "kernels": self.kernels, "projections": self.projections}
        data = {"environment": about, "text_tokens": TEXT, **tables, "left_out": self.left_out}
        for ending, text in (("json", json.dumps(data, indent=2)), ("md", markdown(data))):
            replace(self.path.with_suffix(f".{ending}"), text + "\n")

    @property
    def path(self) -> Path:
        """Where results go, without the ending."""
        return self.folder / f"gpu-{''.join(c if c.isalnum() else '-' for c in device_name(self.device).lower())}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds; runs on a CPU")
    parser.add_argument("--minutes", type=float, default=8.5, help="what there is time for")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not (options.quick or torch.cuda.is_available()):
        parser.error("there is no GPU here; --quick -o DIR runs small shapes on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run = Run(device, options.quick, options.output, time.monotonic() + 60 * options.minutes)
    kernel_table(run)
    projection_table(run)
    for name, shape in (QUICK if run.quick else SHAPES).items():
        if run.fits(name, 45):
            model_rows(run, name, shape)
    run.write()
    print(run.path.with_suffix(".md").read_text())


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def model_rows(run: Run, name: str, shape: dict[str, Any]) -> None:
    """All recipes of one model, eager and then compiled, at each batch size."""
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    model = random_llava(**shape, dtype=dtype, device=run.device)
    traced = foveate.trace(model)
    few = 1 if run.quick else None
    passes = {"dense": None, **{recipe: f"recipe:{recipe}" for recipe in RECIPES[:few]}}
    with torch.inference_mode(), sdpa(model):
        for backend in BACKENDS[:few]:
            programs = {
                label: foveate.optimize(model, text, backend=backend, traced=traced) for label, text in passes.items()
            }
            for batch in BATCHES[:few]:
                if not run.fits(f"{name}, {backend}, batch {batch}", 20 if backend == "eager" else 60):
                    continue
                inputs = random_inputs(model, batch=batch, text_tokens=TEXT if not run.quick else 12)
                contenders: dict[str, Any] = {"Hugging Face": model, **programs} if backend == "eager" else programs
                times = measure(contenders, inputs, 2 if run.quick else 3, 4 if run.quick else 8)
                for label, timing in times.items():
                    peak = peak_bytes(run.device, partial(contenders[label], **inputs))
                    found = row(name, backend, batch, label, timing, peak, programs)
                    if run.device.type == "cuda" and label in programs:
                        found |= captured_decode(programs[label], inputs)
                    run.models.append(found)
                run.write()


def row(
    name: str, backend: str, batch: int, label: str, timing: Timing, peak: int, programs: dict[str, Any]
) -> dict[str, Any]:
    """One line of the table, with the FLOPs that are counted."""
    program = programs.get(label, programs["dense"]).program
    spent = foveate.cost(program, text_tokens=TEXT, batch=batch, device="h200")
    return {
        "model": name,
        "backend": backend if label != "Hugging Face" else "transformers, SDPA",
        "batch": batch,
        "passes": label,
        "first_token_s": timing.prefill_s,
        "decode_s": timing.decode_s,
        "peak_bytes": peak,
        "flops": spent.first_token_flops,
        "predicted_s": spent.first_token_s,
    }


def captured_decode(program: Any, inputs: dict[str, Tensor], steps: int = 8) -> dict[str, Any]:
    """Median seconds of decode steps that are CUDA graphs, the captures not counted."""
    try:
        program.capture_steps()
        out, times = program(**inputs), []
        token = inputs["input_ids"][:, -1:]
        for _ in range(2 + steps):
            out, spent = timed(partial(program, input_ids=token, past_key_values=out.cache))
            times.append(spent)
        return {"captured_decode_s": statistics.median(times[2:])}
    except Exception as error:  # a figure that is missing, not the end
        return {"captured_error": str(error).splitlines()[0]}
    finally:
        program.capture_steps(False)


def apart(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """A linear for each weight."""
    return [linear(x, weight) for weight in weights]


def projection_table(run: Run) -> None:
    """q, k and v, and gate and up, as one matmul with the weights behind one another, against one each."""
    shapes = {"small": (64, [64, 32, 32], [128, 128])} if run.quick else PROJECTIONS
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32
    for name, (hidden, *groups) in shapes.items():
        for widths in groups:
            for tokens in (1, 8) if run.quick else (1, 32, 640, 8 * 640):
                if not run.fits(f"projections of {name}, {tokens} tokens", 2):
                    continue
                x = torch.randn(tokens, hidden, device=run.device, dtype=dtype)
                weights = [torch.randn(width, hidden, device=run.device, dtype=dtype) for width in widths]
                whole = torch.cat(weights)
                seconds = 0.05 if run.quick else 0.2
                each = median_of(partial(apart, x, weights), seconds)
                fused = median_of(partial(linear, x, whole), seconds)
                run.projections.append(
                    {"model": name, "widths": widths, "tokens": tokens, "apart_s": each, "fused_s": fused}
                )
    run.write()


def peak_bytes(device: torch.device, call: Callable[[], Any]) -> int:
    """Most memory during a call, weights included; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def kernel_table(run: Run) -> None:
    """Causal neighbour attention of one image: what the dispatcher takes, Triton, FlexAttention, dense SDPA."""
    cases = [((4, 2), 8, 1)] if run.quick else KERNELS
    for heads, side, radius in cases:
        if not run.fits(f"kernels {heads}, {side} x {side}, radius {radius}", 8):
            continue
        run.kernels.append(kernel_row(run, heads, side, radius))
    run.write()


def kernel_row(run: Run, heads: tuple[int, int], side: int, radius: int) -> dict[str, Any]:
    tokens, size = side * side, 16 if run.quick else SIZE
    dtype = torch.bfloat16 if run.device.type == "cuda" else torch.float32

    def stream(count: int) -> Tensor:
        return torch.randn(1, tokens, count, size, device=run.device, dtype=dtype).transpose(1, 2)

    q, k, v = stream(heads[0]), stream(heads[1]), stream(heads[1])
    place = torch.arange(tokens, device=run.device)
    order = place[None]
    coords = torch.stack([torch.zeros_like(place), place // side, place % side], 1)[None]
    grids = torch.tensor([[0, 0, side, side, 0, 0]])
    options = (radius, "chebyshev", True, size**-0.5)
    calls: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        "foveate": lambda: ops.neighbor_attention(q, [k], [v], order, [order], coords, grids, *options),
    }
    if run.device.type == "cuda" and available(run.device):
        calls["triton"] = lambda: triton_launch.forward(q, k, v, None, None, grids, *options)
        calls["flex"] = flex(q, k, v, side, radius)
    seconds = 0.05 if run.quick else 0.2
    found: dict[str, Any] = {"heads": list(heads), "tokens": tokens, "radius": radius}
    for name, call in calls.items():
        try:
            found[f"{name}_s"] = median_of(call, seconds)
        except Exception as error:  # a kernel that cannot be built here is a figure that is missing, not the end
            found[f"{name}_error"] = str(error).splitlines()[0]
    found["form"] = planned(q, [k], grids, radius, "chebyshev", True).form
    moved = sum(x.numel() for x in (q, q, k, v)) * q.element_size()
    found["bandwidth_bound_s"] = moved / devices()["h200"].bytes_per_s
    if "triton" in calls:
        found["backward_s"] = backward_s(q, k, v, grids, options, seconds)
        dense, sparse = calls["foveate"](), triton_launch.forward(q, k, v, None, None, grids, *options)[0]
        found["error"] = float((dense.float() - sparse.float()).abs().max())
    return found


def backward_s(q: Tensor, k: Tensor, v: Tensor, grids: Tensor, options: tuple[Any, ...], seconds: float) -> float:
    o, lse = triton_launch.forward(q, k, v, None, None, grids, *options)
    return median_of(lambda: triton_launch.backward(o, q, k, v, None, None, o, lse, grids, *options), seconds)


def flex(q: Tensor, k: Tensor, v: Tensor, side: int, radius: int) -> Callable[[], Any]:
    """The same window through FlexAttention, compiled; its block mask is made before the clock starts."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(b: Any, h: Any, query: Any, key: Any) -> Any:
        rows, columns = query // side - key // side, query % side - key % side
        return (query >= key) & (rows.abs() <= radius) & (columns.abs() <= radius)

    mask = create_block_mask(near, None, None, side * side, side * side, device=q.device)
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


if __name__ == "__main__":
    main()
