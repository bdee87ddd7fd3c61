"""Visual tokens use some attention heads only; text uses all of them.

    before                                           after, kept heads first (K of H)
    q.visual, k.visual, v.visual   H heads           K heads: slices of the projections
    a.visual = attention(q.visual; both)             the same with K heads; o.visual reads K heads
    a.text   = attention(q.text; both)               [attention(q.text[:K]; both), attention(q.text[K:]; k.text)]

Heads are reordered so that the kept ones stand in front, which does not change the function. In a dropped head text
attends to text alone, with a softmax over text keys ("renormalised"); a key head of a group goes only when all its
query heads go. An approximation: YOPO (arXiv 2410.06169, section 3.3), which drops the heads that calibration finds
idle; its code keeps those whose mass ratio is above alpha in more than 40 of 100 samples. Its code also does not
renormalise: in a dropped head it sets text's attention to visual keys to zero behind the softmax (`renorm=false`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from foveate.errors import PassError
from foveate.ir.attention import attentions, looks_at_visual
from foveate.ir.heads import drop_heads, plan_heads
from foveate.ir.rewriter import Rewriter
from foveate.ir.statistics import RHO
from foveate.passes.base import Pass, Skipped, count_of, layers_text, number, whole
from foveate.passes.head_scores import weight_norm_scores

_BELONGS = {"average": "keep", "scores": "keep", "stats": "alpha, and to keep with scores=activity"}
"""Option -> the options with which it is looked at."""


@dataclass(frozen=True)
class DropVisualHeads(Pass):
    """In layers from `from_layer` on, visual tokens use `keep` query heads, those above `alpha`, or those of `mask`.

    keep: 0 to the number of heads (0.5: half of them), those with the largest `scores` (ties: lower index); with
    `average`, so many a layer on average over these layers. alpha: heads whose activity is above it in more than
    `vote` of the samples stay. mask: [layers][heads], True stays. scores: [layers][heads], `activity`, its mean over
    the samples, or `weight-norm`, the Frobenius norm of each head's value-output product (default: activity where
    there are statistics). rho: what activity is, `mass` (attention to visual over attention to text keys, YOPO's
    code) or `output` (norm of the head's output at visual over that at text tokens, its text). stats: the statistics,
    made by `foveate calibrate`. renorm: false for the arithmetic of YOPO's checkpoints, which removes less: visual keys
    and values stay. Layers before `from_layer` keep every head; YOPO exempts the first two.
    """

    name: ClassVar[str] = "drop-visual-heads"
    source: ClassVar[str] = "YOPO, arXiv 2410.06169, section 3.3"

    keep: int | float | None = None
    mask: Any = None
    from_layer: int = 2
    scores: Any = None
    alpha: float | None = None
    vote: float = 0.4
    rho: Literal["mass", "output"] = "mass"
    average: bool = False
    stats: str | None = None
    renorm: bool = True

    def __post_init__(self) -> None:
        for name in ("mask", "scores"):
            object.__setattr__(self, name, _nested(self.name, name, getattr(self, name)))
        given = [name for name in ("keep", "alpha", "mask") if getattr(self, name) is not None]
        if len(given) != 1:
            raise PassError(f"{self.name}: give one of keep, alpha and mask; {' and '.join(given) or 'none'} was given")
        if self.keep is not None:
            self.require_count_or_share("keep", "a number of heads")
        self.require(self.alpha is None or (number(self.alpha) and self.alpha >= 0), "alpha", "a ratio, 0 or more")
        self.require(number(self.vote) and 0 <= self.vote < 1, "vote", "a share of the samples, 0 to below 1")
        self.require(self.rho in RHO, "rho", ", ".join(RHO))
        for option in ("average", "renorm"):
            self.require(isinstance(getattr(self, option), bool), option, "true, false")
        self.require(self.stats is None or isinstance(self.stats, str), "stats", "a file made by `foveate calibrate`")
        self._require_use()
        self.require(whole(self.from_layer) and self.from_layer >= 0, "from_layer", "a layer number, 0 or more")

    def _require_use(self) -> None:
        """Raise PassError for options that the choice of heads would not look at."""
        idle = {
            "average": self.average and self.keep is None,
            "scores": self.scores is not None and self.keep is None,
            "stats": self.stats is not None and (self.mask is not None or self.scores not in (None, "activity")),
        }
        for option in (name for name, unused in idle.items() if unused):
            raise PassError(f"{self.name}: {option} has no meaning here; it belongs to {_BELONGS[option]}")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        self.require_layer(edit.program, "from_layer")
        done: list[int] = []
        kept, why = self._kept(edit)
        for layer, keep in enumerate(kept):
            if layer < self.from_layer:
                if self.mask is not None and not all(keep):
                    yield f"layer {layer} keeps every head, whatever the mask says: from_layer={self.from_layer}"
            elif not all(keep) and any(map(looks_at_visual, attentions(edit.graph, layer, "text"))):
                drop_heads(edit, layer, plan_heads(keep, edit.program.info.kv_heads), self.renorm)
                done.append(layer)
        if not done:
            raise Skipped(f"no visible layer from {self.from_layer} on has a head to drop")
        edit.refresh()
        edit.sweep()
        counts = [sum(keep) for keep in kept[min(done) : max(done) + 1]]
        mean = sum(counts) / len(counts)
        yield (
            f"{layers_text(min(done), max(done))}: {edit.program.info.heads} -> {mean:g} heads for visual tokens"
            f"{'' if len(set(counts)) == 1 else ' on average'}{why}"
        )

    def _kept(self, edit: Rewriter) -> tuple[list[list[bool]], str]:
        """Which heads of each layer stay, and, where statistics say so, a remark on them."""
        model = edit.program.info
        if self.mask is not None:
            _check_shape(self.name, "mask", self.mask, model.layers, model.heads)
            return [[bool(x) for x in row] for row in self.mask], ""
        if self.alpha is not None:
            found = self.statistics(edit, self.stats, f"alpha={self.alpha}")
            why = f", {self.rho} ratio above {self.alpha:g} in more than {self.vote:.0%} of {found.samples} samples"
            return found.active(self.alpha, self.vote, self.rho).tolist(), why
        assert self.keep is not None  # __post_init__ saw to it
        count = count_of(self.keep, model.heads)
        if count > model.heads:
            raise PassError(f"{self.name}: keep={self.keep}, but the model has {model.heads} heads")
        scores, why = self._scores(edit)
        if self.average:
            share = self.keep * model.heads if isinstance(self.keep, float) else self.keep
            total = math.floor(share * (model.layers - self.from_layer))
            return _best_of_all(scores, self.from_layer, total), why
        best = [_best(row, count) for row in scores]
        return [[h in chosen for h in range(model.heads)] for chosen in best], why

    def _scores(self, edit: Rewriter) -> tuple[list[list[float]], str]:
        model = edit.program.info
        wanted = self.scores
        if wanted is None:
            wanted = "weight-norm" if self.stats is None and edit.statistics is None else "activity"
        if wanted == "weight-norm":
            return weight_norm_scores(edit.program), ""
        if wanted == "activity":
            found = self.statistics(edit, self.stats, "scores=activity")
            return found.activity(self.rho).tolist(), f", largest mean {self.rho} ratio over {found.samples} samples"
        _check_shape(self.name, "scores", wanted, model.layers, model.heads)
        return [list(map(float, row)) for row in wanted], ""


def _nested(name: str, option: str, value: Any) -> Any:
    """Tensors, arrays and lists as nested tuples; a string or None as it is."""
    if value is None or isinstance(value, str):
        if option == "scores" and value not in (None, "activity", "weight-norm"):
            raise PassError(f"{name}: scores={value!r}; allowed: activity, weight-norm, or numbers [layers][heads]")
        return value
    rows = value.tolist() if hasattr(value, "tolist") else value
    try:
        return tuple(tuple(row) for row in rows)
    except TypeError:
        raise PassError(f"{name}: {option} must be [layers][heads], one row a layer") from None


def _best(scores: list[float], count: int) -> set[int]:
    """The heads with the largest scores; ties go to the lower index."""
    return set(sorted(range(len(scores)), key=lambda h: (-scores[h], h))[:count])


def _best_of_all(scores: list[list[float]], first: int, count: int) -> list[list[bool]]:
    """The `count` heads with the largest scores in layers from `first` on; ties go to the lower layer and index."""
    places = [(layer, head) for layer in range(first, len(scores)) for head in range(len(scores[layer]))]
    best = set(sorted(places, key=lambda place: (-scores[place[0]][place[1]], place))[:count])
    return [[layer < first or (layer, head) in best for head in range(len(row))] for layer, row in enumerate(scores)]


def _check_shape(name: str, option: str, rows: Any, layers: int, heads: int) -> None:
    widths = {len(row) for row in rows}
    if len(rows) != layers or widths != {heads}:
        raise PassError(
            f"{name}: {option} is {len(rows)} rows of {sorted(widths)} entries; "
            f"the model has {layers} layers of {heads} heads"
        )
