"""What the Triton kernels of neighbour attention would take of GPUs that need not be there; see README.md.

Writes benchmarks/results/triton_resources.md. Figures are read from machine code; nothing is timed.
"""

from __future__ import annotations

from pathlib import Path

import torch
import triton

from foveate.kernels.neighbor.offline import Resources, launches, meta_problem, resources

TARGET = Path(__file__).parent / "results" / "triton_resources.md"
PROBLEMS = {
    "32/32 heads, e=128": meta_problem(32, 32, 128),
    "28/4 heads, e=128": meta_problem(28, 4, 128),
    "28/4 heads, e=128, radius 5": meta_problem(28, 4, 128, radius=5),
    "32/8 heads, e=128": meta_problem(32, 8, 128),
    "32/2 heads, e=128": meta_problem(32, 2, 128),
    "32/32 heads, e=96": meta_problem(32, 32, 96),
    "32/32 heads, e=64": meta_problem(32, 32, 64),
    "28/4 heads, e=64": meta_problem(28, 4, 64),
    "32/32 heads, e=128, fp32": meta_problem(32, 32, 128, dtype=torch.float32),
    "28/4 heads, e=128, fp32": meta_problem(28, 4, 128, dtype=torch.float32),
}
CAPABILITIES = (80, 90, 100)
HEAD = f"""# Resources of the Triton kernels, compiled without a GPU

Made by `python benchmarks/triton_resources.py` with Triton {triton.__version__}. bf16 unless said, causal, Chebyshev,
text before the image; radius 2 unless said. Registers are those of a thread, shared memory that of a program, in KiB;
a spill is counted in bytes of a thread. A kernel that spills nothing is not thereby fast: nothing here is timed.

| inputs | kernel | capability | patch | block | warps | stages | registers | spills | shared | matrix | copies |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def main() -> None:
    """Compile everything and write the table."""
    lines = []
    for title, problem in PROBLEMS.items():
        for capability in CAPABILITIES:
            for name, launch in launches(problem, capability).items():
                found = resources(launch, capability)
                config = launch.config
                patch = f"{config.rows} x {config.cols}"
                cells = [title, f"`{name}`", f"{capability / 10}", patch, config.block, config.warps, config.stages]
                line = f"| {' | '.join(map(str, cells))} | {_figures(found)} |"
                print(line, *found.faults(), flush=True)
                lines.append(line)
    TARGET.write_text(HEAD + "\n".join(lines) + "\n")


def _figures(found: Resources) -> str:
    counts = (", ".join(f"{count} {name}" for name, count in x.items()) or "none" for x in (found.matrix, found.copies))
    return " | ".join([str(found.registers), str(found.spilled), f"{found.shared / 1024:.0f}", *counts])


if __name__ == "__main__":
    main()
