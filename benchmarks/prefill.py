"""Prefill speed-up against FLOP speed-up, for three pipelines on each backend; see README.md."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PIPELINES = {
    "half-half-half": ",".join(
        [
            "drop-visual-heads{keep=8,from_layer=0}",
            "drop-visual-neurons{keep=0.5}",
            "cut-visual{from_layer=6}",
        ]
    ),
    "cut-visual": "cut-visual{from_layer=6}",
    "fastv": "fastv{layer=2,keep=0.25}",
}
BACKENDS = ("eager", "inductor")
FULL = {
    "layers": 12,
    "hidden": 1024,
    "heads": 16,
    "ffn": 2816,
    "visual-tokens": 576,
    "text-tokens": 64,
    "threads": 2,
    "repeat": 15,
    "new-tokens": 16,
}
SMALL = {"layers": 8, "hidden": 128, "ffn": 352, "visual-tokens": 64, "text-tokens": 16, "threads": 1}
QUICK = {**FULL, **SMALL, "repeat": 2, "new-tokens": 2}
ENOUGH = 0.85
RESULTS = Path(__file__).parent / "results"


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
    folder.mkdir(parents=True, exist_ok=True)
    sizes = QUICK if args.quick else FULL
    runs = []
    for backend in args.backend or BACKENDS:
        for name, passes in PIPELINES.items():
            print(f"{backend}: {name} ...", file=sys.stderr, flush=True)
            runs.append({"name": name, **bench(passes, backend, sizes)})
    result = {"sizes": sizes, "environment": runs[0]["environment"], "runs": runs}
    table = markdown(result)
    replace(folder / "prefill-cpu.json", json.dumps(result, indent=2) + "\n")
    replace(folder / "prefill-cpu.md", table)
    print(table)


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
    versions = ", ".join(f"{name} {about[name]}" for name in ("foveate", "torch", "transformers", "python"))
    lines = [
        "# Prefill against FLOPs on a CPU",
        "",
        f"{versions}; {about['cpu']}, {about['cpus']} CPUs. Random weights, fp32: {shape}. Medians, in ms.",
        "",
        "| backend | passes | HF | dense | optimized | FLOPs | over dense | efficiency"
        " | over HF | efficiency | decode |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    lines += [row(run) for run in result["runs"]]
    legend = f"Efficiency: measured over FLOP speed-up; **bold** is below {ENOUGH}. Decode: one step, over dense."
    return "\n".join([*lines, "", legend, ""])


def row(run: dict[str, Any]) -> str:
    """One bench as a line of the table."""
    times = [f"{1000 * run[name]['prefill_s']:.1f}" for name in ("hf", "dense", "optimized")]
    figures = [
        f"{run['flop_speedup']:.2f}x",
        f"{run['prefill_speedup']:.2f}x",
        efficiency(run["efficiency"]),
        f"{run['prefill_speedup_vs_hf']:.2f}x",
        efficiency(run["efficiency_vs_hf"]),
        f"{run['decode_speedup']:.2f}x",
    ]
    return f"| {' | '.join([run['backend'], run['name'], *times, *figures])} |"


def efficiency(value: float) -> str:
    """Two digits; bold where it is not enough."""
    return f"{value:.2f}" if value >= ENOUGH else f"**{value:.2f}**"


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_suffix(path.suffix + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    main()
