"""Prefill speed-up against FLOP speed-up, for four pipelines on each backend; see README.md."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from writing import RESULTS, needs, replace, versions

RUNS = (
    ("recipe:yopo-25", 1),
    ("recipe:yopo-25", 4),
    ("recipe:yopo-12", 1),
    ("recipe:yopo-12", 4),
    ("cut-visual{from_layer=6}", 1),
    ("fastv{layer=2,keep=0.25}", 1),
)
"""Passes, and prompts at once."""
BACKENDS = ("eager", "inductor", "onnx")
FULL = {
    "layers": 12,
    "hidden": 1024,
    "heads": 16,
    "ffn": 2816,
    "visual-tokens": 576,
    "text-tokens": 64,
    "threads": 2,
    "repeat": 9,
    "new-tokens": 8,
}
SMALL = {"layers": 8, "hidden": 128, "ffn": 352, "visual-tokens": 64, "text-tokens": 16, "threads": 1}
QUICK = {**FULL, **SMALL, "repeat": 2, "new-tokens": 2}
ENOUGH = {"recipe:yopo-12": 0.8}
"""Share of the FLOP speed-up that should become time; else 0.9."""


def main() -> None:
    """Run all benches and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes; needs -o")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="only this one; may be repeated")
    parser.add_argument("-o", "--output", type=Path, help=f"folder for the results (default: {RESULTS.name})")
    args = parser.parse_args()
    if args.quick and args.output is None:
        parser.error("--quick needs -o DIR: its times mean nothing and must not replace the results")
    folder: Path = args.output or RESULTS
    sizes = QUICK if args.quick else FULL
    backends = args.backend or BACKENDS
    if "onnx" in backends:
        needs(parser, "onnx", "onnxruntime")
    runs = []
    for backend in backends:
        for passes, batch in RUNS:
            print(f"{backend}: {passes}, batch {batch} ...", file=sys.stderr, flush=True)
            runs.append({"name": passes, **bench(passes, backend, {**sizes, "batch": batch})})
            result = {"sizes": sizes, "environment": runs[0]["environment"], "runs": runs}
            replace(folder / "prefill-cpu.json", json.dumps(result, indent=2) + "\n")
            replace(folder / "prefill-cpu.md", markdown(result))
    print(markdown(result))


def bench(passes: str, backend: str, sizes: dict[str, int]) -> dict[str, Any]:
    """What `foveate bench --json` says, from a process of its own."""
    options = [part for name, value in sizes.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "foveate.cli.main", "bench", "random:llava", "--passes", passes]
    command += ["--backend", backend, *options, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"foveate bench failed with exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def markdown(result: dict[str, Any]) -> str:
    """The table, and what it was measured with."""
    sizes, about = result["sizes"], result["environment"]
    shape = ", ".join(f"{name} {value}" for name, value in sizes.items())
    lines = [
        "# Prefill against FLOPs on a CPU",
        "",
        f"{versions(about)}; {about['cpu']}, {about['cpus']} CPUs. Random weights, fp32: {shape}. Medians, in ms.",
        "",
        "| backend | passes | batch | HF | dense | optimized | FLOPs | over dense | share | over HF | share | decode |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [row(run) for run in result["runs"]]
    legend = "Share: measured over FLOP speed-up; **bold** is below 0.9 (yopo-12: 0.8). Decode: one step, over dense."
    return "\n".join([*lines, "", legend, ""])


def row(run: dict[str, Any]) -> str:
    """One bench as a line of the table."""
    times = [f"{1000 * run[name]['prefill_s']:.1f}" for name in ("hf", "dense", "optimized")]
    figures = [
        f"{run['flop_speedup']:.2f}x",
        f"{run['prefill_speedup']:.2f}x",
        share(run["efficiency"], run["name"]),
        f"{run['prefill_speedup_vs_hf']:.2f}x",
        share(run["efficiency_vs_hf"], run["name"]),
        f"{run['decode_speedup']:.2f}x",
    ]
    name = f"`{run['name']}`"
    return f"| {' | '.join([run['backend'], name, str(run['batch']), *times, *figures])} |"


def share(value: float, name: str) -> str:
    """Two digits; bold where it is not enough."""
    return f"{value:.2f}" if value >= ENOUGH.get(name, 0.9) else f"**{value:.2f}**"


if __name__ == "__main__":
    main()
