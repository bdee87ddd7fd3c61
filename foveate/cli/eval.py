"""`foveate eval`."""

from __future__ import annotations

import click

from foveate.cli.options import PASSES, backend_option, json_option
from foveate.cli.output import table, talking

TASKS = ("lookup", "count", "row", "mixed")


@click.command("eval")
@click.argument("model")
@click.option("--passes", "-p", metavar="P", help=f"{PASSES} Not for a folder that foveate saved.")
@click.option("--task", type=click.Choice(TASKS), default="mixed", show_default=True, help="Kind of question.")
@click.option("-n", "n", type=click.IntRange(min=1), default=128, show_default=True, help="Held-out questions.")
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Questions at once.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the questions.")
@backend_option
@json_option
def command(
    model: str, passes: str | None, task: str, n: int, batch: int, seed: int, backend: str, as_json: bool
) -> None:
    """Accuracy of MODEL on held-out questions about digit images, before and after the passes.

    MODEL is "digits", or a folder with a model trained on the same tasks. A folder that foveate saved has its passes,
    and is set beside "digits". An answer counts if it is right word for word.
    """
    from foveate.cli.errors import UseError
    from foveate.cli.models import DIGITS, is_saved, load_model, load_saved, saved_processor
    from foveate.passes.pipeline import pipeline_text, resolve
    from foveate.report.figures import folded, percent, spaced

    with talking(as_json) as out:
        saved = is_saved(model)
        if saved == (passes is not None):
            raise UseError(f"{model} was saved by foveate: leave --passes out" if saved else "give --passes")
        chosen = resolve(passes)
        out.tick("loading the model", 0, 1)
        loaded = load_model(DIGITS if saved else model)
        processor = saved_processor(model) if saved else loaded.get_processor()
        import foveate
        from foveate.evaluate import agreement, evaluate
        from foveate.models.digits import samples

        drawn = samples(task=task, n=n, seed=seed)
        out.tick("optimizing", 0, 1)
        optimized = load_saved(model, backend) if saved else foveate.optimize(loaded.model, chosen, backend=backend)
        text = ",".join(r.text for r in optimized.program.passes) if saved else pipeline_text(chosen)
        before = evaluate(loaded.model, processor, drawn, batch=batch, tick=out.tick, label="asking the dense model")
        after = evaluate(optimized, processor, drawn, batch=batch, tick=out.tick, label="asking the optimized model")
        out.say(folded(f"{model}, {spaced(text) or 'no passes'}"))
        shown = table(None, "model", "accuracy", *before.by_task(), "n")
        for name, score in (("dense", before), ("optimized", after)):
            shown.add_row(name, percent(score.accuracy), *map(percent, score.by_task().values()), str(n))
        out.say(
            shown,
            f"both say the same to {percent(agreement(before, after))} of {n} held-out {task} questions",
        )
        out.finish(
            {
                "dense": before.to_json(),
                "optimized": after.to_json(),
                "agreement": agreement(before, after),
                "task": task,
                "split": "heldout",
                "seed": seed,
                "model": model,
                "passes": text,
                "backend": backend,
            }
        )
