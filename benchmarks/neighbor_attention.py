"""Neighbour attention on one CPU thread against dense attention, form by form and as picked; see README.md.

python benchmarks/neighbor_attention.py           measures, writes results/neighbor_attention.json and .md
python benchmarks/neighbor_attention.py --flex    FlexAttention as well (compiles; minutes more)
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from writing import RESULTS, replace

import foveate.kernels  # noqa: F401  registers the op
from foveate import ops
from foveate.kernels.neighbor import blocks, dispatch, reference, tiles
from foveate.kernels.neighbor.inputs import Inputs
from foveate.machine import environment, thread_count
from foveate.neighborhood import Call, Grids
from foveate.neighborhood.plan import blocks_layout, tiles_layout

SIDES = (24, 48, 64)
RADII = (1, 2, 3, 5, 8, 13)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
HEADS, SIZE = 8, 64
SCALE = SIZE**-0.5
CHECKED = 24
"""Images of up to so many rows are compared with the reference before they are timed."""

Contenders = dict[str, Callable[[], Tensor]]


def medians(contenders: Contenders, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each, processor time and wall clock; all take turns, in a new order each round."""
    names, order = list(contenders), random.Random(0)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(-1, rounds):
        # What ran before leaves its mark on the caches and the allocator.
        order.shuffle(names)
        for name in names:
            begin = time.process_time(), time.perf_counter()
            contenders[name]()
            done = time.process_time(), time.perf_counter()
            if turn >= 0:  # The first round fills the caches.
                spent[name].append((done[0] - begin[0], done[1] - begin[1]))
    return {
        name: {kind: 1e3 * statistics.median(x) for kind, x in zip(("cpu_ms", "wall_ms"), zip(*pairs))}
        for name, pairs in spent.items()
    }


def streams(side: int, dtype: torch.dtype, transposed: bool) -> list[Tensor]:
    """q, k, v [1, H, n, e], in memory [1, n, H, e] as projections leave them, or as they stand."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(1, side**2, HEADS, SIZE, generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    return [x if transposed else x.contiguous() for x in made]


def contenders_for(side: int, radius: int, dtype: torch.dtype, causal: bool, flex: bool) -> tuple[Contenders, str]:
    """What is timed, and what the dispatcher says about it."""
    place = torch.arange(side**2)
    order, coords = place[None], torch.stack([0 * place, place // side, place % side], 1)[None]
    images = torch.tensor([[0, 0, side, side, 0, 0]])
    options = radius, "chebyshev", causal
    q, k, v = streams(side, dtype, True)
    qc, kc, vc = streams(side, dtype, False)

    def op(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ops.neighbor_attention(q, [k], [v], order, [order], coords, images, *options, SCALE)

    def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).contiguous()

    call, grids = dispatch.described(q, [k], images, *options)
    assert grids is not None
    contenders: Contenders = {
        "dense": lambda: dense(q, k, v),
        "dense contiguous": lambda: dense(qc, kc, vc),
        "dispatcher": lambda: op(q, k, v),
        "dispatcher contiguous": lambda: op(qc, kc, vc),
        **forms(q, k, v, order, coords, call, grids),
    }
    if not causal:
        contenders["dense not causal"] = lambda: dense(q, k, v, False)
    if flex:
        contenders["flex"] = flex_attention(q, k, v, side, radius, causal)
    if side <= CHECKED:
        expected = reference.neighbor_attention(q, [k], [v], order, [order], coords, images, *options, SCALE)
        for name, run in contenders.items():
            if not name.startswith("dense"):
                torch.testing.assert_close(run(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)
    return contenders, dispatch.planned(q, [k], images, *options).explain()


def forms(q: Tensor, k: Tensor, v: Tensor, order: Tensor, coords: Tensor, call: Call, grids: Grids) -> Contenders:
    """Each form in its own best layout, chosen or not."""
    inputs = Inputs(q, (k, k[:, :, :0]), (v, v[:, :, :0]), order, (order, order[:, :0]), coords, SCALE)
    cut, dense = tiles_layout(call, grids), blocks_layout(call, grids)
    return {
        "tiles": lambda: tiles.attend(inputs, call, grids, cut),
        "blocks": lambda: blocks.attend(inputs, call, grids, dense),
    }


def flex_attention(q: Tensor, k: Tensor, v: Tensor, side: int, radius: int, causal: bool) -> Callable[[], Tensor]:
    """FlexAttention with its own block mask, compiled."""
    from torch.nn.attention.flex_attention import create_block_mask
    from torch.nn.attention.flex_attention import flex_attention as flex

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        close = ((i // side - j // side).abs() <= radius) & ((i % side - j % side).abs() <= radius)
        return close & (j <= i) if causal else close

    mask = create_block_mask(seen, None, None, side**2, side**2, device="cpu")
    compiled = torch.compile(flex, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask).transpose(1, 2).contiguous()


def run(sides: list[int], radii: list[int], rounds: int, flex: bool) -> dict[str, Any]:
    """All sizes, radii and dtypes."""
    rows = []
    with torch.inference_mode(), thread_count(1):
        for causal in (True, False):
            for side in sides:
                for radius in radii:
                    for name, dtype in DTYPES.items():
                        torch.compiler.reset()
                        contenders, explained = contenders_for(side, radius, dtype, causal, flex)
                        about = {"tokens": side**2, "radius": radius, "dtype": name, "causal": causal}
                        rows.append({**about, "plan": explained, "times": medians(contenders, rounds)})
                        print(about, file=sys.stderr, flush=True)
    return {"environment": environment(), "heads": HEADS, "size": SIZE, "rounds": rounds, "rows": rows}


def speedup(row: dict[str, Any], name: str, over: str = "dense", clock: str = "cpu_ms") -> float:
    """How much faster than dense attention."""
    fast, slow = row["times"][name][clock], row["times"][over][clock]
    return float(slow / fast)


def to_markdown(result: dict[str, Any]) -> str:
    """The tables of the causal and of the two-sided window."""
    about, rows = result["environment"], result["rows"]
    lines = [
        "# Neighbour attention on a CPU",
        "",
        f"`python benchmarks/neighbor_attention.py`: {about['cpu']}, 1 thread, torch {about['torch']}; "
        f"{result['heads']} heads of {result['size']}, square images, Chebyshev windows. Medians of {result['rounds']} "
        "rounds in which all take turns in random order. Figures are speed-ups by processor time, which busy "
        "neighbours disturb least, over `scaled_dot_product_attention(is_causal=True)` of the same run and layout; "
        "*wall*: by the wall clock.",
    ]
    flex = any("flex" in row["times"] for row in rows)
    for causal in (True, False):
        lines += ["", "## Causal" if causal else "## Not causal", ""]
        if not causal:
            lines += ["*not causal*: over dense attention without a mask, which does twice the causal one's work.", ""]
        heads = ["tokens", "radius", "dtype", "dense, ms", "op, ms", "op", "wall", "contiguous", "tiles", "blocks"]
        heads += ["not causal"] * (not causal) + ["FlexAttention"] * flex + ["picked"]
        lines += [f"| {' | '.join(heads)} |", "|" + "--:|" * (len(heads) - 1) + "---|"]
        lines += [line(row, flex) for row in rows if row["causal"] == causal]
    return "\n".join(lines) + "\n"


def line(row: dict[str, Any], flex: bool) -> str:
    """One line of a table."""
    cells = [str(row["tokens"]), str(row["radius"]), row["dtype"]]
    cells += [f"{row['times'][name]['cpu_ms']:.1f}" for name in ("dense", "dispatcher")]
    figures = [speedup(row, "dispatcher"), speedup(row, "dispatcher", clock="wall_ms")]
    figures += [
        speedup(row, "dispatcher contiguous", "dense contiguous"),
        speedup(row, "tiles"),
        speedup(row, "blocks"),
    ]
    if not row["causal"]:
        figures.append(speedup(row, "dispatcher", "dense not causal"))
    if flex:
        figures.append(speedup(row, "flex"))
    cells += [f"{figure:.2f}x" for figure in figures]
    return f"| {' | '.join([*cells, row['plan'].splitlines()[0].replace(': chosen', '')])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=list(SIDES))
    parser.add_argument("--radii", type=int, nargs="+", default=list(RADII))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--flex", action="store_true", help="time FlexAttention too")
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "neighbor_attention", help="without its ending")
    args = parser.parse_args()
    result = run(args.sides, args.radii, args.rounds, args.flex)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    replace(args.output.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    replace(args.output.with_suffix(".md"), to_markdown(result))
    print(to_markdown(result))


if __name__ == "__main__":
    main()
