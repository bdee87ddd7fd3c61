"""`foveate demo`."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from foveate.cli.options import json_option
from foveate.cli.output import Out, table, talking

if TYPE_CHECKING:
    from foveate.models.digits import Sample
    from foveate.report.compare import Row

RECIPES: dict[str, str] = {
    "cut-visual": "cut-visual{from_layer=5}",
    "1/2 of the heads": "drop-visual-heads{keep=4}",
    "1/4 of the FFN": "drop-visual-neurons{keep=0.25}",
    "fastv": "fastv{layer=3,keep=0.25}",
    "random-prune": "random-prune{layer=3,keep=0.25}",
    "all three (YOPO)": "drop-visual-heads{keep=4},drop-visual-neurons{keep=0.25},cut-visual{from_layer=6}",
}
"""Rows of the table; random-prune keeps as many tokens at the same layer as fastv: the two compare.

By benchmarks/results/accuracy-digits.md the visual work of late layers and FFNs is nearly free here, while choosing
tokens at layer 3 is too early to read rows: fastv then keeps what the first word of the answer needs, not the others.
"""

REPORTED = "all three (YOPO)"
PICTURED = "fastv"
RESULT, PICTURE, REPORT = "foveate-demo.json", "kept-tokens.png", "report.txt"
SEED = 2034
"""Whose first image shows many digits and a few cells without one."""
PROMPTS = 8
"""Prompts of one timed call."""

FULL, QUICK = (150, 9), (24, 3)
"""Questions for the accuracy, and timed rounds."""
SCORED = {"lookup": "look-up", "row": "rows"}
"""Tasks of those questions, an equal share each, and their column."""


@click.command("demo")
@click.option(
    "-o",
    "--output",
    "folder",
    default="foveate-demo",
    show_default=True,
    metavar="DIR",
    help="For the files.",
)
@click.option("--quick", is_flag=True, help="Fewer questions and rounds: under a minute, rougher figures.")
@json_option
def command(folder: str, quick: bool, as_json: bool) -> None:
    """The whole story on the bundled model: answers, a table of recipes, a pass report, a picture.

    Takes at most three minutes on two cores. Writes kept-tokens.png, report.txt and foveate-demo.json.
    """
    from foveate.cli.folders import own_folder
    from foveate.cli.models import load_model
    from foveate.files import write_whole

    with talking(as_json) as out:
        start = time.perf_counter()
        target = own_folder(folder, RESULT)
        out.tick("loading the digits model", 0, 1)
        loaded = load_model("digits")
        processor = loaded.get_processor()
        asked = _answers(out, loaded.model, processor)
        rows, device = _rows(out, loaded.model, processor, quick)
        by_name = {row.name: row for row in rows}
        report = by_name[REPORTED].model.report()
        out.say(f'What the passes of "{REPORTED}" did:', report.to_text(), "")
        shown = next(entry["sample"] for entry in asked if entry["sample"].task == "lookup")
        picture, kept = _picture(by_name[PICTURED].model, processor, shown)
        result = {
            "answers": [{k: v for k, v in entry.items() if k != "sample"} for entry in asked],
            "table": [row.to_json() for row in rows],
            "prompts": PROMPTS,
            "device": device,
            "report": report.to_json(),
            "picture": str(target / PICTURE),
            "kept": kept,
            "seconds": time.perf_counter() - start,
        }
        write_whole(target / RESULT, json.dumps(result, indent=2, allow_nan=False).encode())
        write_whole(target / REPORT, (report.to_text() + "\n").encode())
        write_whole(target / PICTURE, picture)
        out.say(f"Done in {result['seconds']:.0f} s. {kept['kept']} of {kept['of']} visual tokens, kept by {PICTURED}:")
        out.line(str(target / PICTURE))
        out.finish(result)


def _answers(out: Out, model: Any, processor: Any) -> list[dict[str, Any]]:
    """The dense model's answers to several questions about one held-out image."""
    from foveate.evaluate import evaluate

    asked = _questions()
    score = evaluate(model, processor, asked)
    out.say("A held-out image, as its labels read, and what the bundled model sees in it:", "")
    _say_grid(out, asked[0])
    shown = table(None, "question", "answer", "truth", "", left=3)
    entries = []
    for sample, said, right in zip(asked, score.said, score.right):
        shown.add_row(sample.question, said, sample.answer, "right" if right else "wrong")
        entries.append(
            {
                "question": sample.question,
                "answer": said,
                "truth": sample.answer,
                "right": right,
                "sample": sample,
            }
        )
    out.say(shown)
    return entries


def _questions() -> list[Sample]:
    """A look-up, two rows and two counts about one image."""
    import dataclasses

    from foveate.models.digits import Question, prompt_for, samples

    first = samples(task="lookup", n=1, seed=SEED)[0]
    common = max((cell for line in first.grid for cell in line if cell.isdigit()), key=str(first.grid).count)
    questions = [
        Question("row", row=1),
        Question("lookup", row=0, column=2),
        Question("lookup", row=3, column=1),
        Question("count", digit=int(common)),
        Question("row", row=3),
    ]
    return [
        dataclasses.replace(
            first,
            question=q.text,
            prompt=prompt_for(q.text),
            answer=q.answer(first.grid),
            task=q.task,
            cells=q.cells(first.grid),
        )
        for q in questions
    ]


def _say_grid(out: Out, sample: Sample) -> None:
    for line in sample.grid:
        out.say("    " + " ".join(f"{cell if cell.isdigit() else '.':>2}" for cell in line))


def _rows(out: Out, model: Any, processor: Any, quick: bool) -> tuple[list[Row], dict[str, Any]]:
    """The table's rows, shown as a table."""
    import dataclasses

    from foveate.machine import calibrate
    from foveate.models.digits import samples
    from foveate.report.compare import compare

    text = model.config.text_config
    n, repeat = QUICK if quick else FULL
    out.tick("calibrating", 0, 1)
    # The shape of the decoder's own FFN over all the prompts' tokens.
    device = calibrate(PROMPTS * 160, text.intermediate_size, text.hidden_size, seconds=2.0)
    timed = samples(task="lookup", n=PROMPTS, seed=SEED)
    # No counts: the model does not count, so that they would say nothing about a recipe.
    asked = [sample for task in SCORED for sample in samples(task=task, n=n // len(SCORED), seed=SEED + 1)]
    rows = compare(model, processor, RECIPES, asked, timed=timed, device=device, repeat=repeat, tick=out.tick)
    _say_rows(out, rows, device.name)
    return rows, dataclasses.asdict(device)


def _say_rows(out: Out, rows: list[Row], device: str) -> None:
    from foveate.report.compare import losses
    from foveate.report.figures import count, folded, ms, percent, size, spaced

    n = len(rows[0].score.right)
    shown = table(
        f"{PROMPTS} prompts at once, times in ms; right answers to {n} held-out questions",
        "model",
        "FLOPs",
        "predicted",
        "prefill",
        "decode",
        "KV cache",
        *SCORED.values(),
    )
    for row in rows:
        shown.add_row(
            row.name,
            count(row.cost.first_token_flops),
            ms(row.predicted_s),
            ms(row.timing.prefill_s),
            ms(row.timing.decode_s),
            size(row.cost.kv_bytes),
            *(percent(row.score.by_task()[task]) for task in SCORED),
        )
    out.say(shown)
    out.say("FLOPs and prefill: vision and decoder of one call. decode: one token. Times are medians, eager.")
    out.say(f"predicted: the prefill time by a roofline of {device}.", "")
    for row in rows[1:]:
        out.say(folded(f"{row.name}: {spaced(row.passes)}"))
    for loss in losses(rows):
        out.say(folded(f"SLOWER than dense: {loss}"))
    out.say("")


def _picture(model: Any, processor: Any, sample: Sample) -> tuple[bytes, dict[str, Any]]:
    """A PNG of the tokens that stay for one question, and how many they are."""
    from foveate.evaluate import evaluate
    from foveate.report.compare import batch_inputs
    from foveate.report.kept import kept_masks, kept_places
    from foveate.report.picture import kept_tokens_png, png_bytes

    inputs = batch_inputs(processor, [sample])
    about = model.program.info
    ((layer, (places,)),) = kept_places(model, inputs).items()
    (mask,) = kept_masks(about, inputs, places)
    said = evaluate(model, processor, [sample]).said[0]
    caption = (
        f"asked: {sample.question}\nanswered: {said} (truth: {sample.answer})\n"
        f"{len(places)} of {about.tokens_per_image} visual tokens stay before layer {layer}"
    )
    return png_bytes(kept_tokens_png(sample.image, mask, caption)), {
        "layer": layer,
        "kept": len(places),
        "of": about.tokens_per_image,
        "answer": said,
    }
