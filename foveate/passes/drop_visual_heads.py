"""Visual tokens use some attention heads only; text uses all of them.

    before                                           after, kept heads first (K of H)
    q.visual, k.visual, v.visual   H heads           K heads: slices of the projections
    a.visual = attention(q.visual; both)             the same with K heads; o.visual reads K heads
    a.text   = attention(q.text; both)               [attention(q.text[:K]; both), attention(q.text[K:]; k.text)]

Heads are reordered so that the kept ones stand in front, which does not change the function. In a dropped head text
attends to text alone, with a softmax over text keys ("renormalised"); a key head of a group goes only when all its
query heads go. An approximation: YOPO (arXiv 2410.06169, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.errors import PassError
from foveate.ir.attention import attentions, looks_at_visual
from foveate.ir.heads import drop_heads, plan_heads
from foveate.ir.rewriter import Rewriter
from foveate.passes.base import Pass, Skipped, count_of, layers_text, whole
from foveate.passes.head_scores import weight_norm_scores


@dataclass(frozen=True)
class DropVisualHeads(Pass):
    """In layers from `from_layer` on, visual tokens use `keep` query heads, or those that `mask` marks True.

    keep: 0 to the number of heads (0.5: half of them), those with the largest `scores` (ties: lower index).
    mask: [layers][heads]. scores: [layers][heads], or `weight-norm`: the Frobenius norm of each head's value-output
    product. Layers before `from_layer` keep every head; YOPO exempts the first two.
    """

    name: ClassVar[str] = "drop-visual-heads"
    source: ClassVar[str] = "YOPO, arXiv 2410.06169, section 3.3"

    keep: int | float | None = None
    mask: Any = None
    from_layer: int = 2
    scores: Any = "weight-norm"

    def __post_init__(self) -> None:
        for name in ("mask", "scores"):
            object.__setattr__(self, name, _nested(self.name, name, getattr(self, name)))
        self.require((self.keep is None) != (self.mask is None), "keep", "a number of heads, or give `mask` instead")
        if self.keep is not None:
            self.require_count_or_share("keep", "a number of heads")
        self.require(whole(self.from_layer) and self.from_layer >= 0, "from_layer", "a layer number, 0 or more")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        self.require_layer(edit.program, "from_layer")
        done: dict[int, int] = {}
        for layer, keep in enumerate(self._kept(edit)):
            if layer < self.from_layer:
                if self.mask is not None and not all(keep):
                    yield f"layer {layer} keeps every head, whatever the mask says: from_layer={self.from_layer}"
            elif not all(keep) and any(map(looks_at_visual, attentions(edit.graph, layer, "text"))):
                drop_heads(edit, layer, plan_heads(keep, edit.program.info.kv_heads))
                done[layer] = sum(keep)
        if not done:
            raise Skipped(f"no visible layer from {self.from_layer} on has a head to drop")
        edit.refresh()
        edit.sweep()
        mean = sum(done.values()) / len(done)
        yield (
            f"{layers_text(min(done), max(done))}: {edit.program.info.heads} -> {mean:g} heads for visual tokens"
            f"{'' if len(set(done.values())) == 1 else ' on average'}"
        )

    def _kept(self, edit: Rewriter) -> list[list[bool]]:
        model = edit.program.info
        if self.mask is not None:
            _check_shape(self.name, "mask", self.mask, model.layers, model.heads)
            return [[bool(x) for x in row] for row in self.mask]
        assert self.keep is not None  # __post_init__ saw to it
        count = count_of(self.keep, model.heads)
        if count > model.heads:
            raise PassError(f"{self.name}: keep={self.keep}, but the model has {model.heads} heads")
        if self.scores == "weight-norm":
            scores = weight_norm_scores(edit.program)
        else:
            _check_shape(self.name, "scores", self.scores, model.layers, model.heads)
            scores = [list(map(float, row)) for row in self.scores]
        best = [_best(row, count) for row in scores]
        return [[h in chosen for h in range(model.heads)] for chosen in best]


def _nested(name: str, option: str, value: Any) -> Any:
    """Tensors, arrays and lists as nested tuples; a string or None as it is."""
    if value is None or isinstance(value, str):
        if option == "scores" and value != "weight-norm":
            raise PassError(f"{name}: scores={value!r}; allowed: weight-norm, or numbers [layers][heads]")
        return value
    rows = value.tolist() if hasattr(value, "tolist") else value
    try:
        return tuple(tuple(row) for row in rows)
    except TypeError:
        raise PassError(f"{name}: {option} must be [layers][heads], one row a layer") from None


def _best(scores: list[float], count: int) -> set[int]:
    """The heads with the largest scores; ties go to the lower index."""
    return set(sorted(range(len(scores)), key=lambda h: (-scores[h], h))[:count])


def _check_shape(name: str, option: str, rows: Any, layers: int, heads: int) -> None:
    widths = {len(row) for row in rows}
    if len(rows) != layers or widths != {heads}:
        raise PassError(
            f"{name}: {option} is {len(rows)} rows of {sorted(widths)} entries; "
            f"the model has {layers} layers of {heads} heads"
        )
