"""The tables of gpu.py's results."""

from __future__ import annotations

from typing import Any


def markdown(data: dict[str, Any]) -> str:
    about = data["environment"]
    lines = [
        f"# {about['device']}",
        "",
        f"`python benchmarks/gpu.py{' --quick' if about['quick'] else ''}`: foveate {about['foveate']}, torch "
        f"{about['torch']}, transformers {about['transformers']}; random weights, {data['text_tokens']} text "
        "tokens, one image a prompt; medians. *Gain* is over the dense program of the same backend, *share* the gain "
        "over the FLOP ratio, *captured* a step as a CUDA graph.",
        "",
        "| model | backend | batch | passes | first token ms | gain | share | predicted ms | decode ms | gain | "
        "captured ms | GiB |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in data["models"]:
        key = (r["model"], r["batch"])
        base = next(
            (b for b in data["models"] if (b["model"], b["batch"]) == key and b["passes"] == "dense"
             and b["backend"] == r["backend"]), None
        )  # fmt: skip
        gain = base["first_token_s"] / r["first_token_s"] if base else None
        share = gain / (base["flops"] / r["flops"]) if base and gain else None
        step = base["decode_s"] / r["decode_s"] if base else None
        lines.append(
            f"| {r['model']} | {r['backend']} | {r['batch']} | {r['passes']} | {1e3 * r['first_token_s']:.1f} | "
            f"{x(gain)} | {'' if share is None else f'{share:.2f}'} | {1e3 * r['predicted_s']:.1f} | "
            f"{1e3 * r['decode_s']:.2f} | {x(step)} | {ms(r.get('captured_decode_s'))} | "
            f"{r['peak_bytes'] / 2**30:.1f} |"
        )
    lines += [
        "",
        "## Neighbour attention, causal, bf16, heads of 128",
        "",
        "Microseconds; *bound* is reading and writing alone at the H200's data-sheet bandwidth.",
        "",
        "| heads | tokens | radius | dense SDPA | foveate | form | over SDPA | Triton | over SDPA | FlexAttention | "
        "bound | backward | error |",
        "|---|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in data["kernels"]:
        cells = [
            us(r.get(f"{name}_s")) for name in ("sdpa", "foveate", "triton", "flex", "bandwidth_bound", "backward")
        ]
        over = [x(r["sdpa_s"] / r[f"{name}_s"]) if r.get(f"{name}_s") else "" for name in ("foveate", "triton")]
        error = f"{r['error']:.1e}" if "error" in r else ""
        lines.append(
            f"| {r['heads'][0]}/{r['heads'][1]} | {r['tokens']} | {r['radius']} | {cells[0]} | {cells[1]} | "
            f"{r['form']} | {over[0]} | {cells[2]} | {over[1]} | {cells[3]} | {cells[4]} | {cells[5]} | {error} |"
        )
    lines += [
        "",
        "## Projections as one matmul",
        "",
        "| model | rows | tokens | one each us | one for all us | gain |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for r in data["projections"]:
        rows = " + ".join(map(str, r["widths"]))
        gain = x(r["apart_s"] / r["fused_s"])
        lines.append(f"| {r['model']} | {rows} | {r['tokens']} | {us(r['apart_s'])} | {us(r['fused_s'])} | {gain} |")
    if data["left_out"]:
        lines += ["", "Left out for lack of time: " + "; ".join(data["left_out"]) + "."]
    return "\n".join(lines)


def x(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def us(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e6 * seconds:.1f}"


def ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.2f}"
