"""Diffs as plain data for tests of the page: a small one with every state, a hostile one and a large one."""

from __future__ import annotations

from typing import Any

from foveate.ir.diff import diff
from foveate.ir.diff.gates import Gate, GateResult
from tests.ir.programs import pruned, traced

PASSES = "drop-visual-heads{keep=2,from_layer=1},drop-visual-neurons,fastv{layer=1},cut-visual{from_layer=2}"

HOSTILE = (
    '</script><script>window.__pwned = 1</script><img src=x onerror="window.__pwned = 2"><!-- \u2028 ]]> '
    "'\" onmouseover='window.__pwned = 3' {{x}} ${x} $title &amp; \u202etxet \ud800 \x00"
)
"""Would run, or break the page, wherever it is not kept as text."""

Cell = dict[str, Any]


def line(name: str, op: str, stream: str, role: str, value: str, by: str = "split") -> str:
    """A node as the diff writes it."""
    weight = f'weight("layers.{{l}}.{role}.weight")'
    return f"{name} = aten.{op}.default({stream}_x, {weight}) ; {stream} {role} | {by} | {value}"


def cell(stream: str, role: str, state: str = "same", what: str = "", by: tuple[str, ...] = (), nodes: int = 2) -> Cell:
    """One role of one stream; changed lines are half as wide in B."""
    a = [line(f"{stream}_linear_{n}", "linear", stream, role, "bfloat16[batch, n, 11008]") for n in range(nodes)]
    b = [text.replace("11008", "5504").replace("split", "drop-visual-neurons") for text in a]
    sides = {
        "same": (a, []),
        "changed": (a, [*b, "extra_1 = aten.neg.default(x)"]),
        "removed": (a, []),
        "added": ([], b),
    }
    before, after = sides[state]
    return {"stream": stream, "role": role, "state": state, "what": what, "by": list(by), "a": before, "b": after}


def small() -> dict[str, Any]:
    """Three graphs, every state, every kind of figure."""
    gate = cell("visual", "mlp.gate_proj", "changed", "11008 -> 5504", ("drop-visual-neurons",))
    text_only = ("cut-visual",)
    prefill = [
        section(-1, -1, [cell("visual", "rotary_emb"), cell("text", "rotary_emb"), cell("none", "prefix")]),
        section(
            0, 1, [cell("visual", "self_attn.q_proj"), gate, cell("text", "self_attn.q_proj"), cell("text", "mlp")]
        ),
        section(
            2,
            3,
            [
                cell("visual", "self_attn.q_proj", "removed", "removed", text_only),
                cell("text", "self_attn", "changed", "text sees text only", text_only),
                cell("text", "select", "added", "added: attention_row, top_tokens", ("fastv",)),
                cell("joint", "", "same"),
            ],
        ),
        section(4, 4, [cell("text", "lm_head")]),
    ]
    return {
        "changed": True,
        "a": {"name": "llava-1.5-7b", "passes": []},
        "b": {"name": "llava-1.5-7b", "passes": ["drop-visual-neurons", "cut-visual{from_layer=2}"]},
        "notes": ["made with torch 2.12.0 and 2.13.0: the graphs may differ for that alone"],
        "graphs": {
            "vision": graph([section(0, 0, [cell("none", "mlp.fc1")])], 3, 3),
            "prefill": graph(prefill, 4012, 2101),
            "decode": graph([section(0, 3, [cell("text", "mlp")])], 900, 900),
        },
        "cost": {
            "vision.flops": figure(4e11, 4e11),
            "prefill.flops": figure(8.2e12, 2.6e12),
            "prefill.time_s": figure(0.0832, 0.0312),
            "decode.time_s": figure(8.5e-6, 9.5e-6),
            "kv_bytes": figure(333_447_168, 181_403_648),
            "peak_bytes": figure(0, 14_000_000_000),
        },
        "parts": {
            "prefill": {
                "a": [part(0, 3, "visual", 3e11), part(0, 3, "text", 3e10), part(4, 4, "text", 1e9)],
                "b": [part(0, 1, "visual", 2e11), part(0, 3, "text", 3e10), part(4, 4, "text", 1e9)],
            },
            "vision": {"a": [part(0, 0, "none", 1e10)], "b": [part(0, 0, "none", 1e10)]},
        },
        "kv": {
            "a": [kept(0, 3, "bfloat16[batch, 32, visual_tokens, 128]")],
            "b": [kept(0, 1, "bfloat16[batch, 32, visual_tokens, 128]"), kept(2, 3, None)],
        },
        "passes": {
            "a": [],
            "b": [
                record("drop-visual-neurons", ["layers 0 to 1: visual gate/up/down 11008 -> 5504 neurons (prefix)"]),
                {
                    **record("fastv{keep=1.0}", []),
                    "edits": {},
                    "cost": None,
                    "skipped": "keep=1 keeps every visual token",
                },
            ],
        },
        "gates": [
            GateResult(Gate.of("prefill.flops>+1%"), -0.683, True).to_json(),
            GateResult(Gate.of("decode.time_s>+1%"), 0.1176, False).to_json(),
        ],
    }


def real() -> dict[str, Any]:
    """The diff of two small programs as the compiler makes it."""
    return diff(traced()[1], pruned(PASSES)).to_json()


def section(first: int, last: int, cells: list[Cell]) -> dict[str, Any]:
    return {"layers": [first, last], "cells": cells}


def graph(sections: list[dict[str, Any]], a: int, b: int) -> dict[str, Any]:
    """Sections, and as changes every cell that is not the same."""
    changes = [
        {
            "layers": s["layers"],
            "stream": c["stream"],
            "roles": [c["role"]],
            "state": c["state"],
            "what": c["what"],
            "by": c["by"],
        }
        for s in sections
        for c in s["cells"]
        if c["state"] != "same"
    ]
    return {"changed": bool(changes), "nodes": {"a": a, "b": b}, "sections": sections, "changes": changes}


def figure(a: float, b: float) -> dict[str, float | None]:
    return {"a": a, "b": b, "change": (b - a) / a if a else None}


def part(first: int, last: int, stream: str, flops: float) -> dict[str, Any]:
    return {"layers": [first, last], "stream": stream, "flops": flops, "bytes": flops / 10, "time_s": flops / 1e14}


def kept(first: int, last: int, visual: str | None) -> dict[str, Any]:
    return {"layers": [first, last], "visual": visual, "text": "bfloat16[batch, 32, text_tokens, 128]"}


def record(text: str, notes: list[str]) -> dict[str, Any]:
    cost = {"prefill_flops": [8.2e12, 5.1e12], "kv_bytes": [100, 100]}
    return {"text": text, "notes": notes, "edits": {"changed": 6}, "skipped": None, "cost": cost}


def hostile() -> dict[str, Any]:
    """The small diff with the hostile text in place of every string that the page does not know by name."""
    known = {"visual", "text", "none", "joint", "same", "changed", "removed", "added"}

    def spoil(value: Any) -> Any:
        if isinstance(value, str):
            return value if value in known else value + HOSTILE
        if isinstance(value, list):
            return [spoil(entry) for entry in value]
        if isinstance(value, dict):
            return {key: spoil(entry) for key, entry in value.items()}
        return value

    spoilt: dict[str, Any] = spoil(small())
    for key in ("graphs", "parts"):
        spoilt[key] = {name + HOSTILE: entry for name, entry in spoilt[key].items()}
    spoilt["graphs"]["__proto__"] = graph(
        [section(0, 0, [cell("visual" + HOSTILE, HOSTILE, "changed", HOSTILE)])], 1, 1
    )
    spoilt["cost"]["x" + HOSTILE] = figure(1, 2)
    return spoilt


ROLES = (
    "input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn", "self_attn.o_proj",
    "residual", "post_attention_layernorm", "mlp.gate_proj", "mlp.act_fn", "mlp.up_proj", "mlp", "mlp.down_proj",
)  # fmt: skip


def large(layers: int = 32) -> dict[str, Any]:
    """A diff in which no two layers are equal, so that nothing folds."""
    states = ("same", "changed", "removed")
    sections = [
        section(n, n, [
            cell(stream, role, states[(n + place) % 3] if stream == "visual" else "same", f"{11008 - n} -> 5504")
            for place, role in enumerate(ROLES)
            for stream in ("visual", "text")
        ])
        for n in range(layers)
    ]  # fmt: skip
    told = small()
    told["graphs"] = {name: graph(sections, 4000, 2000) for name in ("prefill", "decode")}
    told["parts"]["prefill"] = {
        side: [part(n, n, stream, 1e11 * (layers - n)) for n in range(layers) for stream in ("visual", "text")]
        for side in ("a", "b")
    }
    told["kv"]["a"] = told["kv"]["b"] = [kept(n, n, f"bfloat16[batch, {n}, visual_tokens, 128]") for n in range(layers)]
    return told
