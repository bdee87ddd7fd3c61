"""Time and memory of `trace` and `optimize` on LLaVA-1.5-7B's shapes, on the meta device; see README.md."""

from __future__ import annotations

import json
import resource
import time
from typing import Any

import foveate
from foveate.models.random import random_llava
from foveate.passes import CutVisual, DropVisualHeads, DropVisualNeurons, FastV, RandomPrune

SHAPES: dict[str, Any] = {
    "layers": 32,
    "hidden": 4096,
    "heads": 32,
    "ffn": 11008,
    "visual_tokens": 576,
    "vision_layers": 24,
    "vision_hidden": 1024,
    "vision_heads": 16,
    "vocab": 32064,
}
PASSES = [DropVisualHeads(keep=16), DropVisualNeurons(0.5), FastV(2, 0.5), RandomPrune(5, 0.5), CutVisual(16)]


def main() -> None:
    """Print one JSON object: seconds, peak resident GB, and prefill FLOPs before and after."""
    model = random_llava(**SHAPES, device="meta")
    start = time.perf_counter()
    program = foveate.trace(model)
    traced = time.perf_counter()
    optimized = foveate.optimize(model, PASSES)
    done = time.perf_counter()
    print(
        json.dumps(
            {
                "trace_s": round(traced - start, 2),
                "optimize_s": round(done - traced, 2),
                "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
                "prefill_flops": foveate.cost(program).prefill.flops,
                "prefill_flops_optimized": foveate.cost(optimized.program).prefill.flops,
            }
        )
    )


if __name__ == "__main__":
    main()
