"""What `foveate eval` tells of those it asked: a table, and JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foveate.cli.output import Out, table

if TYPE_CHECKING:
    from foveate.evaluate import Score

HEADINGS = {"f1": "F1", "yes_ratio": "says yes"}


@dataclass(frozen=True)
class Rival:
    """One who is asked. passes: none for the dense model. make: the model, when it is needed."""

    label: str
    passes: str | None
    make: Callable[[], Any]


def to_json(rivals: Sequence[Rival], scores: Sequence[Score]) -> dict[str, Any]:
    """The scores as JSON: of the dense model, of each recipe, and of the first one under names of its own."""
    from foveate.evaluate import agreement

    dense = scores[0] if rivals[0].passes is None else None
    recipes = [
        {
            "passes": rival.passes,
            "score": found.to_json(),
            "agreement": None if dense is None else agreement(dense, found),
        }
        for rival, found in zip(rivals, scores, strict=True)
        if rival.passes is not None
    ]
    first = recipes[0] if recipes else {"score": None, "agreement": None}
    return {
        "dense": None if dense is None else dense.to_json(),
        "optimized": first["score"],
        "agreement": first["agreement"],
        "recipes": recipes,
    }


def show(out: Out, model: str, rivals: Sequence[Rival], scores: Sequence[Score], asked: str) -> None:
    """A table of the scores, and how often each recipe says what the dense model says. asked: what was asked."""
    from foveate.evaluate import agreement
    from foveate.report.figures import folded, percent, spaced

    recipes = [rival for rival in rivals if rival.passes is not None]
    if len(recipes) == 1:
        out.say(folded(f"{model}, {spaced(recipes[0].passes or '') or 'no passes'}"))
    else:
        out.say(folded(model))
        for rival in recipes:
            out.say(folded(f"{rival.label}: {spaced(rival.passes or '') or 'no passes'}"))
    extra = [name for name in scores[0].figures if name != "accuracy"]
    tasks, n = scores[0].by_task(), len(scores[0].marks)
    shown = table(None, "model", "accuracy", "95%", *(HEADINGS.get(name, name) for name in extra), *tasks, "n")
    for rival, found in zip(rivals, scores, strict=True):
        of = found.figures["accuracy"]
        values = (*(found.figures[name].value for name in extra), *found.by_task().values())
        interval = f"{100 * of.low:.1f}-{100 * of.high:.1f}"
        shown.add_row(rival.label, percent(found.accuracy), interval, *map(percent, values), str(n))
    out.say(shown)
    if rivals[0].passes is None:
        for rival, found in zip(rivals[1:], scores[1:], strict=True):
            who = "both say" if len(recipes) == 1 else f"dense and {rival.label} say"
            out.say(f"{who} the same to {percent(agreement(scores[0], found))} of {n} {asked}")
