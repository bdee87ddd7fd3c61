"""The table and the picture of accuracy.py's results; run it to write them, and docs' page, from the JSON again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from writing import RESULTS, replace, versions

from foveate.intervals import wilson

DOCS = Path(__file__).parents[1] / "docs"
MARKS = "<!-- table of benchmarks/accuracy.py -->", "<!-- end of table -->"
"""Between these the page in docs holds the table."""

TITLES = {"lookup": "look-up", "row": "rows", "count": "count"}
JUDGED = ("lookup", "row")
"""The model never learnt to count, so those answers are not drawn."""
STYLES = {
    "dense": ("#222222", "*"),
    "cut-visual": ("#d1495b", "o"),
    "drop-visual-heads": ("#00798c", "s"),
    "drop-visual-neurons": ("#edae49", "^"),
    "neighbor-attention": ("#66418a", "D"),
    "all four": ("#3c6e47", "P"),
    "fastv, layer 1": ("#8d99ae", "v"),
    "random-prune, layer 1": ("#8d99ae", "<"),
    "fastv, layer 3": ("#b07d62", "v"),
    "random-prune, layer 3": ("#b07d62", "<"),
}


def markdown(result: dict[str, Any]) -> str:
    """The table, and what it was measured with."""
    questions = result["questions"]
    asked = ", ".join(f"{n} {TITLES[task]}" for task, n in questions.items())
    seeds = ", ".join(str(result["seeds"][task]) for task in questions)
    lines = [
        "# Accuracy at equal FLOPs on digits",
        "",
        f"{versions(result['environment'])}. Held-out questions: {asked} (seeds {seeds}). ±: half of a 95% "
        "interval, in points.",
        "",
        table(result),
        "",
        "Each score: as pruned -> **after a short fine-tune** of the decoder's weights (the last row: LoRA, rank 16), "
        f"{result['steps']} steps of {result['batch']} questions about training digits.",
        f"Prefill FLOPs: of the decoder, over dense, at 144 visual and {result['text_tokens']} text tokens. "
        "Settings were chosen by FLOPs alone, nearest to 75%, 50% and 25%.",
        "The model does not count (`1` every time would be right as often): judge by the other two columns.",
        "`no image` never sees it: what training gives back there is guessing.",
        "",
    ]
    return "\n".join(lines)


def table(result: dict[str, Any]) -> str:
    """A line for each strategy at each setting."""
    questions = result["questions"]
    lines = [
        f"| strategy | passes | prefill FLOPs | {' | '.join(TITLES[task] for task in questions)} |",
        f"|---|---|--:|{'--:|' * len(questions)}",
        *(_row(entry, questions) for entry in result["rows"]),
    ]
    return "\n".join(lines)


def _row(entry: dict[str, Any], questions: dict[str, int]) -> str:
    share = f"{entry['prefill_flops_share']:.0%}"
    if entry["out_of_reach"]:
        missed = " and ".join(f"{target:.0%}" for target in entry["out_of_reach"])
        share += f" ({missed} out of reach: at least {entry['least_share']:.0%})"
    name = entry["name"] + (", LoRA" if entry["training"].get("lora_rank") else "")
    passes = f"`{entry['passes']}`" if entry["passes"] else ""
    scores = [
        f"{_percent(entry['right'][task], n)} -> **{_percent(entry['right_trained'][task], n)}**"
        for task, n in questions.items()
    ]
    return f"| {' | '.join([name, passes, share, *scores])} |"


def _percent(right: int, n: int) -> str:
    low, high = wilson(right, n)
    return f"{right / n:.1%} ±{50 * (high - low):.0f}"


def plot(result: dict[str, Any], path: Path) -> None:
    """A PNG: accuracy against FLOPs for each kind of question, hollow as pruned, filled after training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, len(JUDGED), sharey=True)
    for axis, task in zip(axes, JUDGED, strict=True):
        n = result["questions"][task]
        for name, (color, marker) in STYLES.items():
            rows = [r for r in result["rows"] if r["name"] == name and not r["training"].get("lora_rank")]
            rows.sort(key=lambda r: r["prefill_flops_share"])
            x = [100 * r["prefill_flops_share"] for r in rows]
            for key, fill, line in (("right", "none", ":"), ("right_trained", color, "-")):
                y = [100 * r[key][task] / n for r in rows]
                label = name if key == "right_trained" else None
                axis.plot(x, y, line, color=color, marker=marker, markerfacecolor=fill, label=label, lw=1.2, ms=6)
        axis.set_title(f"{TITLES[task]}: {n} held-out questions")
        axis.set_xlabel("decoder prefill FLOPs, % of dense")
        axis.set_ylim(-3, 103)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("right, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle("digits: hollow, dotted: as pruned; filled: after a short fine-tune", fontsize=11)
    figure.savefig(path, dpi=130)


def write(result: dict[str, Any], folder: Path) -> None:
    """Markdown and PNG beside the JSON."""
    replace(folder / "accuracy-digits.md", markdown(result))
    plot(result, folder / "accuracy-digits.png")


def main() -> None:
    """Everything that shows the committed results, from their JSON."""
    result = json.loads((RESULTS / "accuracy-digits.json").read_text(encoding="utf-8"))
    write(result, RESULTS)
    plot(result, DOCS / "accuracy.png")
    page = DOCS / "accuracy.md"
    before, rest = page.read_text(encoding="utf-8").split(MARKS[0])
    replace(page, before + MARKS[0] + "\n\n" + table(result) + "\n\n" + MARKS[1] + rest.split(MARKS[1])[1])


if __name__ == "__main__":
    main()
