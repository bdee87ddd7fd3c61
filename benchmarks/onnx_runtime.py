"""ONNX Runtime against eager, each in processes of its own, on one thread; see README.md."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from prefill import FULL, QUICK, bench
from writing import RESULTS, needs, replace, versions

PASSES = ("recipe:yopo-25", "recipe:yopo-12", "fastv{layer=2,keep=0.25}")
BACKENDS = ("eager", "onnx")
ENOUGH = {"prefill": 0.8, "decode": 0.7}
"""Of the eager time of the same program, at most."""
SHARE = 0.8
"""Of the FLOP speed-up that should become time."""


def main() -> None:
    """Run all benches and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes; needs -o")
    parser.add_argument("--turns", type=int, default=2, help="processes of each backend, which take turns (default: 2)")
    parser.add_argument("-o", "--output", type=Path, help=f"folder for the results (default: {RESULTS.name})")
    args = parser.parse_args()
    needs(parser, "onnx", "onnxruntime")
    if args.quick and args.output is None:
        parser.error("--quick needs -o DIR: its times mean nothing and must not replace the results")
    folder: Path = args.output or RESULTS
    sizes = {**(QUICK if args.quick else FULL), "threads": 1, "new-tokens": 16, "batch": 1}
    rows = []
    for passes in PASSES:
        runs: dict[str, list[dict[str, Any]]] = {backend: [] for backend in BACKENDS}
        for turn in range(args.turns):
            for backend in BACKENDS:
                print(f"{passes}: {backend}, {turn + 1} of {args.turns} ...", file=sys.stderr, flush=True)
                runs[backend].append(bench(passes, backend, sizes))
        rows.append({"passes": passes, "flops": runs["onnx"][0]["flop_speedup"], **medians(runs)})
        result = {"sizes": sizes, "turns": args.turns, "environment": runs["onnx"][0]["environment"], "rows": rows}
        replace(folder / "onnx-cpu.json", json.dumps(result, indent=2) + "\n")
        replace(folder / "onnx-cpu.md", markdown(result))
    print(markdown(result))


def medians(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Backend -> program -> seconds of a prefill and of a step, in the median over processes."""
    return {
        backend: {
            program: {
                graph: statistics.median(run[program][f"{graph}_s"] for run in found) for graph in ("prefill", "decode")
            }
            for program in ("dense", "optimized")
        }
        for backend, found in runs.items()
    }


def markdown(result: dict[str, Any]) -> str:
    """The table, and what it was measured with."""
    sizes, about = result["sizes"], result["environment"]
    shape = ", ".join(f"{name} {value}" for name, value in sizes.items())
    lines = [
        "# ONNX Runtime against eager on a CPU",
        "",
        f"{versions(about)}; {about['cpu']}, {about['cpus']} CPUs. Random weights, fp32: {shape}. Medians of "
        f"{result['turns']} processes each, in ms; in brackets over eager.",
        "",
        "| passes | program | prefill, eager | prefill, ORT | step, eager | step, ORT | FLOPs | over dense | share |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        gain = row["onnx"]["dense"]["prefill"] / row["onnx"]["optimized"]["prefill"]
        lines.append(f"| `{row['passes']}` | dense | {' | '.join(times(row, 'dense'))} | | | |")
        share = f"{gain / row['flops']:.2f}"
        figures = [f"{row['flops']:.2f}x", f"{gain:.2f}x", share if gain >= SHARE * row["flops"] else f"**{share}**"]
        lines.append(f"| | optimized | {' | '.join([*times(row, 'optimized'), *figures])} |")
    legend = "Share: measured over FLOP speed-up. **Bold**: over 0.80 of eager (a step: 0.70), a share below 0.8."
    return "\n".join([*lines, "", legend, ""])


def times(row: dict[str, Any], program: str) -> list[str]:
    """Eager and ORT, of the prefill and of a step."""
    cells = []
    for graph, most in ENOUGH.items():
        eager, ort = (1000 * row[backend][program][graph] for backend in BACKENDS)
        over = f"{ort / eager:.2f}"
        cells += [f"{eager:.1f}", f"{ort:.1f} ({over if ort <= most * eager else f'**{over}**'})"]
    return cells


if __name__ == "__main__":
    main()
