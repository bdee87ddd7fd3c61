"""The tables of selection.py's results; run it to write them, and docs' page, from the JSON again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from writing import RESULTS, replace, versions

from foveate.intervals import wilson

PAGE = Path(__file__).parents[1] / "docs" / "selection-results.md"
MARKS = "<!-- tables of benchmarks/selection.py -->", "<!-- end of tables -->"
"""Between these the page in docs holds the tables."""

TITLES = {"lookup": "look-up", "row": "rows"}


def markdown(result: dict[str, Any]) -> str:
    """Both tables, and what they were measured with."""
    return f"# Ways to select visual tokens\n\n{versions(result['environment'])}.\n\n{tables(result)}\n"


def tables(result: dict[str, Any]) -> str:
    """What there is of them."""
    parts = [part for name, part in (("accuracy", on_digits), ("time", on_the_decoder)) if name in result]
    return "\n\n".join("\n".join(part(result)) for part in parts)


def on_digits(result: dict[str, Any]) -> list[str]:
    """A line for each method at each target."""
    asked = ", ".join(f"{n} {TITLES[task]}" for task, n in result["questions"].items())
    lines = [
        f"On `digits` (10 layers, 144 visual and 13 text tokens), held-out questions: {asked}; "
        "±: half of a 95% interval.",
        "",
        "| method | passes | visual work | FLOPs | KV | tokens by layer | prefill time | selecting "
        f"| {' | '.join(TITLES[task] for task in result['questions'])} |",
        f"|---|---|--:|--:|--:|---|--:|--:|{'--:|' * len(result['questions'])}",
    ]
    for row in result["accuracy"]:
        shares = [f"{row[name]:.0%}" if name in row else "" for name in ("work", "flops", "kv")]
        times = [timing(row, "prefill_time", 0), timing(row, "selecting_time", 1)]
        scores = [points(row["right"][task], n) for task, n in result["questions"].items()]
        cells = [row["name"], code(row["passes"]), *shares, runs(row["tokens"]), *times, *scores]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "Visual work: FLOPs in the decoder's prefill over the dense model's, both less those of text alone. FLOPs: the "
        "vision tower too. KV: bytes in the cache behind the prefill. Prefill time: median of "
        f"{result['rounds']} over that of dense ones in between, {result['prompts']} prompts at once, "
        f"{result.get('digits_threads', 1)} threads, tower and selection included; selecting: its share of that time.",
    ]


def on_the_decoder(result: dict[str, Any]) -> list[str]:
    """A line for each method at a quarter."""
    sizes = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in result["decoder"].items())
    lines = [
        f"On the benchmark decoder ({sizes}, 64 text tokens, batch 1, fp32, random weights, "
        f"{result.get('time_threads', 2)} threads), medians of {result['rounds']} prefills, the vision tower and the "
        "selection included:",
        "",
        "| method | passes | dense | optimized | speed-up | FLOPs | selecting, FLOPs | selecting, time |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["time"]:
        faster = row["dense"] / row["optimized"]
        cells = [f"{1000 * row[k]:.0f} ms" for k in ("dense", "optimized")]
        cells += [f"{faster:.2f}x" if faster > 1 else f"**{faster:.2f}x**", f"{row['flops']:.2f}x"]
        cells += [f"{row['selecting_flops']:.2%}", f"{row['selecting_time']:.1%}"]
        lines.append(f"| {row['name']} | {code(row['passes'])} | {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "FLOPs: dense over optimized, decoder alone. Selecting: its FLOPs over the dense decoder's; its time over the "
        "optimized prefill's, node by node.",
    ]


def code(passes: str) -> str:
    """A pipeline as code; of none nothing."""
    return f"`{passes}`" if passes else ""


def timing(row: dict[str, Any], name: str, digits: int) -> str:
    """A share of time, if it was measured."""
    return f"{row[name]:.{digits}%}" if name in row else ""


def points(right: int, n: int) -> str:
    """Percent, and half of its interval."""
    low, high = wilson(right, n)
    return f"{right / n:.1%} ±{50 * (high - low):.0f}"


def runs(tokens: list[int]) -> str:
    """`144 x 2, 36 x 8`."""
    parts: list[list[int]] = []
    for count in tokens:
        if parts and parts[-1][0] == count:
            parts[-1][1] += 1
        else:
            parts.append([count, 1])
    return ", ".join(f"{count} x {times}" for count, times in parts)


def main() -> None:
    """Everything that shows the committed results, from their JSON."""
    result = json.loads((RESULTS / "selection.json").read_text(encoding="utf-8"))
    replace(RESULTS / "selection.md", markdown(result))
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    replace(PAGE, before + MARKS[0] + "\n\n" + tables(result) + "\n\n" + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    main()
