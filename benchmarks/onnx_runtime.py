"""ONNX Runtime against eager, each in processes of its own, on one thread; see README.md."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from prefill import FULL, QUICK, bench
from writing import RESULTS, replace, versions

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
    """Backend -> program -> seconds of a prefill and of a step, in the median over processes.

    `hf` is Hugging Face's own model in torch, which ran in each of them.
    """
    return {
        backend: {
            program: {
                graph: statistics.median(run[program][f"{graph}_s"] for run in found) for graph in ("prefill", "decode")
            }
            for program in ("hf", "dense", "optimized")
        }
        for backend, found in runs.items()
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables, and what they were measured with."""
    sizes, about = result["sizes"], result["environment"]
    shape = ", ".join(f"{name} {value}" for name, value in sizes.items())
    lines = [
        "# ONNX Runtime against eager on a CPU",
        "",
        f"{versions(about)}; {about['cpu']}, {about['cpus']} CPUs. Random weights, fp32: {shape}. Medians, in ms; "
        f"processes of each backend: {result['turns']}. HF: the model of transformers, in the processes of ORT.",
        "",
        "| passes | what | HF | eager | ORT | over eager | over HF |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        for graph, what in (("prefill", "prefill"), ("decode", "step")):
            for program in ("dense", "optimized"):
                name = f"`{row['passes']}`" if (graph, program) == ("prefill", "dense") else ""
                lines.append(f"| {name} | {what}, {program} | {' | '.join(times(row, graph, program))} |")
    lines += ["", "| passes | FLOPs | prefill over dense, in ORT | share |", "|---|--:|--:|--:|"]
    for row in result["rows"]:
        gain = row["onnx"]["dense"]["prefill"] / row["onnx"]["optimized"]["prefill"]
        share = f"{gain / row['flops']:.2f}"
        enough = share if gain >= SHARE * row["flops"] else f"**{share}**"
        lines.append(f"| `{row['passes']}` | {row['flops']:.2f}x | {gain:.2f}x | {enough} |")
    legend = "Share: measured over FLOP speed-up. **Bold**: over 0.80 of eager (a step: 0.70), a share below 0.8."
    return "\n".join([*lines, "", legend, ""])


def times(row: dict[str, Any], graph: str, program: str) -> list[str]:
    """Hugging Face, eager and ORT, and the last over the others."""
    eager, ort = (1000 * row[backend][program][graph] for backend in BACKENDS)
    over = f"{ort / eager:.2f}"
    cells = [f"{eager:.1f}", f"{ort:.1f}", over if ort <= ENOUGH[graph] * eager else f"**{over}**"]
    if program == "optimized":
        return ["", *cells, ""]
    hf = 1000 * row["onnx"]["hf"][graph]
    return [f"{hf:.1f}", *cells, f"{ort / hf:.2f}"]


if __name__ == "__main__":
    main()
