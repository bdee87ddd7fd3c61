"""Compile time of the inductor backend against depth; see README.md.

A program of 32 layers should take little longer than one of 4, because equal layers are compiled once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from writing import RESULTS, replace, versions

PASSES = ("", "recipe:yopo-25", "fastv{layer=2,keep=0.5}")
DEPTHS = (4, 32)
BOUND = 1.5


def main() -> None:
    """Measure every program in a process of its own, without any cache; write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return
    rows = [{"passes": p, "layers": n, **apart(p, n)} for p in PASSES for n in DEPTHS]
    result = {"environment": rows[0].pop("environment"), "rows": rows}
    for row in rows:
        row.pop("environment", None)
    replace(args.output / "compile-time.json", json.dumps(result, indent=2) + "\n")
    replace(args.output / "compile-time.md", markdown(result))
    print(markdown(result))


def apart(passes: str, layers: int) -> dict[str, Any]:
    """What `measure` says, in a new process that finds no cache of earlier ones."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = {"TORCHINDUCTOR_CACHE_DIR": folder, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
        command = [sys.executable, __file__, "--one", passes, str(layers)]
        done = subprocess.run(command, env={**os.environ, **fresh}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    print(f"{passes or 'dense'}, {layers} layers: {found['compile_s']:.1f} s", file=sys.stderr, flush=True)
    return found


def measure(passes: str, layers: int) -> dict[str, Any]:
    """Seconds that the first call and two decode steps take over those that follow: prefill, decode and vision."""
    import torch

    import foveate
    from foveate.machine import environment
    from foveate.models.random import random_inputs, random_llava

    model = random_llava(layers=layers, hidden=256, heads=8, ffn=704, visual_tokens=144)
    optimized = foveate.optimize(model, passes, backend="inductor")
    inputs = random_inputs(model, batch=2, text_tokens=24)

    def answer() -> float:
        begun = time.perf_counter()
        with torch.inference_mode():
            optimized.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        return time.perf_counter() - begun

    first, again = answer(), min(answer() for _ in range(2))
    return {"compile_s": first - again, "answer_s": again, "environment": environment()}


def markdown(result: dict[str, Any]) -> str:
    """The table, and what it was measured with."""
    about = result["environment"]
    by = {(row["passes"], row["layers"]): row["compile_s"] for row in result["rows"]}
    lines = [
        "# Compile time against depth",
        "",
        f"{versions(about)}; {about['cpu']}, {about['cpus']} CPUs. Inductor backend, no caches, hidden 256, 144 "
        "visual tokens; seconds until the first answer of three tokens over those of later ones.",
        "",
        f"| passes | {' | '.join(f'{n} layers' for n in DEPTHS)} | ratio |",
        "|---|--:|--:|--:|",
    ]
    for passes in PASSES:
        shallow, deep = (by[passes, n] for n in DEPTHS)
        ratio = f"{deep / shallow:.2f}" if deep <= BOUND * shallow else f"**{deep / shallow:.2f}**"
        lines.append(f"| {f'`{passes}`' if passes else 'dense'} | {shallow:.1f} s | {deep:.1f} s | {ratio} |")
    return "\n".join([*lines, "", f"**Bold**: above {BOUND}.", ""])


if __name__ == "__main__":
    main()
