"""Long prompts on a CPU: time and memory of a prefill against the number of visual tokens; see README.md."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from writing import RESULTS, replace, versions

TOKENS = (2304, 4096, 9216, 16384)
PASSES = {"dense": "", "neighbours": "neighbor-attention{radius=2}"}
SIDE = 16
"""Rows and columns of tokens of an image; a prompt has as many images as it needs."""
TEXT = 32
DECODER = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "eos_token_id": None,
    "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
}
TOWER = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 256, "patch_size": 8}


def main() -> None:
    """Measure every length, each in a process of its own, and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("PASSES", "TOKENS"), help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="two short lengths; needs -o")
    parser.add_argument("-o", "--output", type=Path, help=f"folder for the results (default: {RESULTS.name})")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(PASSES[args.one[0]], int(args.one[1]), args.repeat)))
        return
    if args.quick and args.output is None:
        parser.error("--quick needs -o DIR: its times mean nothing and must not replace the results")
    rows: list[dict[str, Any]] = []
    for tokens in (256, 512) if args.quick else TOKENS:
        row: dict[str, Any] = {"tokens": tokens}
        for name in PASSES:
            print(f"{tokens} visual tokens, {name} ...", file=sys.stderr, flush=True)
            command = [sys.executable, __file__, "--one", name, str(tokens), "--repeat", str(args.repeat)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout)
            about = found.pop("environment")
            row[name] = found
        rows.append(row)
    result = {"decoder": DECODER, "tower": TOWER, "text_tokens": TEXT, "environment": about, "rows": rows}
    target: Path = args.output or RESULTS
    replace(target / "long-inputs.json", json.dumps(result, indent=2) + "\n")
    replace(target / "long-inputs.md", markdown(result))
    print(markdown(result))


def measure(passes: str, tokens: int, repeat: int) -> dict[str, Any]:
    """Median seconds of a prefill, tower included, and the most memory it took beyond what was there before, in MiB."""
    import torch
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    import foveate
    from foveate.machine import environment

    torch.manual_seed(0)
    config = Qwen2VLConfig(text_config=DECODER, vision_config=TOWER, image_token_id=511, video_token_id=510)
    model = Qwen2VLForConditionalGeneration(config).eval()
    optimized = foveate.optimize(model, passes)
    images = tokens // SIDE**2
    image = [511] * SIDE**2 + [7]
    ids = torch.tensor([[5] * 8 + image * images + [6] * TEXT])
    grid = torch.tensor([[1, 2 * SIDE, 2 * SIDE]] * images)
    pixels = torch.randn(int(grid.prod(1).sum()), 3 * 2 * TOWER["patch_size"] ** 2)
    inputs = {"input_ids": ids, "pixel_values": pixels, "image_grid_thw": grid}
    seconds, peaks = [], []
    with torch.inference_mode():
        optimized(**{**inputs, "input_ids": ids[:, :6], "pixel_values": None, "image_grid_thw": None})
        for _ in range(repeat):
            before = forget_peak()
            begun = time.perf_counter()
            out = optimized(**inputs)
            seconds.append(time.perf_counter() - begun)
            peaks.append(status("VmHWM") - before)
            del out
    return {"prefill_s": statistics.median(seconds), "peak_mib": max(peaks) / 1024, "environment": environment()}


def forget_peak() -> int:
    """Let the kernel count this process's peak anew; KiB that it holds now."""
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(name: str) -> int:
    """KiB, as Linux tells them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def markdown(result: dict[str, Any]) -> str:
    """The table, and what it was measured with."""
    about, rows = result["environment"], result["rows"]
    lines = [
        "# Long prompts on a CPU",
        "",
        f"{versions(about)}; {about['cpu']}, {about['cpus']} CPUs. A Qwen2-VL with random weights (4 layers, 256 wide, "
        f"8 heads), images of {SIDE} x {SIDE} tokens, fp32, the tower included. *A token* is the time or memory of a "
        "row over its visual tokens, relative to the first row: 1.00 is growth by the number of tokens alone.",
        "",
        "| visual tokens | dense | neighbours | a token | dense, MiB | neighbours, MiB | a token | over dense |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    first = rows[0]
    for row in rows:
        dense, near = row["dense"], row["neighbours"]
        longer = row["tokens"] / first["tokens"]
        time_growth, memory_growth = (
            near[key] / first["neighbours"][key] / longer for key in ("prefill_s", "peak_mib")
        )
        cells = [
            f"{dense['prefill_s']:.2f} s",
            f"{near['prefill_s']:.2f} s",
            f"{time_growth:.2f}",
            f"{dense['peak_mib']:.0f}",
            f"{near['peak_mib']:.0f}",
            f"{memory_growth:.2f}",
            f"{near['peak_mib'] / dense['peak_mib']:.2f}x",
        ]
        lines.append(f"| {row['tokens']} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
