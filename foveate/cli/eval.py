"""`foveate eval`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import click

from foveate.cli.options import AT_LEAST_ONE, PASSES, backend_option, json_option
from foveate.cli.output import Out, talking
from foveate.cli.scores import Rival, show, to_json

if TYPE_CHECKING:
    from foveate.evaluate import Score
    from foveate.examples import Question
    from foveate.metrics import Metric

TASKS = ("lookup", "count", "row", "mixed")
METRICS = ("exact", "verbatim", "vqa", "choice", "yes-no")
OF_DIGITS: dict[str, Any] = {"task": "mixed", "n": 128, "seed": 0}
"""What is asked of the bundled data if nothing else is said."""

NEW_TOKENS = 32


@click.command("eval")
@click.argument("model")
@click.option("--data", default="digits", show_default=True, metavar="D", help="JSONL, a folder with one, or digits.")
@click.option("--metric", type=click.Choice(METRICS), help="How replies are marked.  [default: see above]")
@click.option(
    "--passes",
    "-p",
    multiple=True,
    metavar="P",
    help=f"{PASSES} Repeat it to compare. Not for a folder that foveate saved.",
)
@click.option("--new-tokens", type=AT_LEAST_ONE, help="Longest reply.  [default: 32; digits: 5]")
@click.option("--batch", type=AT_LEAST_ONE, default=32, show_default=True, help="Questions at once.")
@click.option("-n", "n", type=AT_LEAST_ONE, help="Questions at most.  [default: all; digits: 128]")
@click.option("--task", type=click.Choice(TASKS), help="digits: kind of question.  [default: mixed]")
@click.option("--seed", type=click.IntRange(min=0), help="digits: draws the held-out questions.  [default: 0]")
@click.option("-o", "--output", metavar="X.jsonl", help="Keep the replies, a line each.")
@click.option("--resume", is_flag=True, help="Go on from the replies in --output.")
@backend_option
@json_option
def command(
    model: str,
    data: str,
    metric: str | None,
    passes: tuple[str, ...],
    new_tokens: int | None,
    batch: int,
    output: str | None,
    resume: bool,
    backend: str,
    as_json: bool,
    **of_digits: Any,
) -> None:
    """Accuracy of MODEL before and after each recipe, with 95% intervals.

    A line of D is {"image", "prompt", "answer"}, with "images" or "answers" for several, "choices" where there are
    some, and maybe an "id". A reply is marked by choice where there are choices, else by exact; on digits by verbatim.
    A folder that foveate saved has its passes; on digits it is set beside "digits", else it is alone.
    """
    from foveate.answers import Answers, check_free, digest
    from foveate.cli.errors import UseError
    from foveate.cli.folders import check_file
    from foveate.cli.models import DIGITS

    with talking(as_json) as out:
        if resume and output is None:
            raise UseError("--resume goes on from the replies in a file: give --output too")
        path = None if output is None else check_file(output, ".jsonl")
        if path is not None:
            check_free(path, resume)
        given = {name: value for name, value in of_digits.items() if value is not None}
        if data != DIGITS and (wrong := sorted(set(given) - {"n"})):
            raise UseError(f"--{wrong[0]} is for digits; leave it out with --data {data}")
        out.tick("loading the model", 0, 1)
        rivals, processor = _rivals(model, passes, backend, data == DIGITS)
        questions, marking = _questions(out, data, given, processor, metric)
        from foveate.models.digits.evaluate import LONGEST_ANSWER

        longest = new_tokens or (LONGEST_ANSWER if data == DIGITS else NEW_TOKENS)
        recipes = [rival.passes for rival in rivals if rival.passes is not None]
        about = {"model": model, "passes": recipes, "data": data, "new_tokens": longest, "backend": backend}
        answers = Answers({**about, "questions": digest(questions)}, path, resume)
        _ask(out, rivals, questions, answers, processor, new_tokens=longest, batch=batch)
        scores = [_score(rival, questions, answers, marking) for rival in rivals]
        drawn = {"split": "heldout", **OF_DIGITS, **given} if data == DIGITS else {}
        told = to_json(rivals, scores)
        show(out, model, rivals, scores, f"held-out {drawn['task']} questions" if drawn else "questions")
        if output is not None:
            out.line(f"replies are in {output}")
        kept = {name: drawn[name] for name in ("task", "split", "seed") if drawn}
        out.finish(
            {
                **told,
                **kept,
                **about,
                "passes": recipes[0] if recipes else None,
                "metric": marking.name,
                "output": output,
            }
        )


def _rivals(model: str, passes: Sequence[str], backend: str, on_digits: bool) -> tuple[list[Rival], Any]:
    """Those who are asked, the dense model first, and their processor."""
    from foveate.cli.errors import UseError
    from foveate.cli.models import DIGITS, is_saved, load_model, load_saved, saved_processor
    from foveate.passes.pipeline import pipeline_text, resolve

    if is_saved(model):
        if passes:
            raise UseError(f"{model} was saved by foveate: leave --passes out")
        saved = load_saved(model, backend)
        text = ",".join(r.text for r in saved.program.passes)
        beside = [Rival("dense", None, lambda: load_model(DIGITS).model)] if on_digits else []
        return [*beside, Rival("optimized", text, lambda: saved)], saved_processor(model)
    chosen = {pipeline_text(each): each for each in map(resolve, passes)}
    if len(chosen) < len(passes):
        raise UseError("the same --passes were given twice; give each once")
    if len(chosen) > len(ascii_uppercase):
        raise UseError(f"{len(chosen)} times --passes; give {len(ascii_uppercase)} at most")
    loaded = load_model(model)
    processor = loaded.get_processor()
    import foveate

    traced = cache(lambda: foveate.trace(loaded.model))

    def optimized(text: str) -> Any:
        return foveate.optimize(loaded.model, chosen[text], backend=backend, traced=traced())

    labels = ["optimized"] if len(chosen) == 1 else ascii_uppercase
    recipes = [Rival(label, text, lambda text=text: optimized(text)) for label, text in zip(labels, chosen)]  # type: ignore[misc]
    return [Rival("dense", None, lambda: loaded.model), *recipes], processor


def _questions(
    out: Out, data: str, given: dict[str, Any], processor: Any, metric: str | None
) -> tuple[Sequence[Question], Metric]:
    """What is asked, and how replies are marked."""
    from foveate.cli.models import DIGITS
    from foveate.cli.questions import check_metric, read_questions
    from foveate.evaluate import digit_questions
    from foveate.metrics import METRICS as MARKING

    if data == DIGITS:
        from foveate.models.digits import samples

        questions, usual = digit_questions(samples(**{**OF_DIGITS, **given})), "verbatim"
    else:
        questions = read_questions(data, processor, given.get("n"), out.tick)
        usual = "choice" if any(question.choices for question in questions) else "exact"
    marking = MARKING[metric or usual]
    check_metric(marking, questions)
    return questions, marking


def _ask(
    out: Out, rivals: Sequence[Rival], questions: Sequence[Question], answers: Any, processor: Any, **options: Any
) -> None:
    """Ask each rival what it has not answered yet."""
    from foveate.evaluate import ask

    missing = {rival: [q for q in questions if answers.get(rival.passes, q) is None] for rival in rivals}
    out.tick("optimizing", 0, 1)
    # All of them before the first is asked, so that passes that do not fit are told at once.
    models = {rival: rival.make() for rival, asked in missing.items() if asked}
    for rival, model in models.items():
        label = f"asking the {rival.label} model" if rival.label in ("dense", "optimized") else f"asking {rival.label}"
        for part, texts in ask(model, processor, missing[rival], tick=out.tick, label=label, **options):
            answers.add(rival.passes, part, texts)


def _score(rival: Rival, questions: Sequence[Question], answers: Any, metric: Metric) -> Score:
    from foveate.evaluate import score

    return score([answers.get(rival.passes, question) for question in questions], questions, metric)
