"""From a layer on, text sees text only and visual tokens are gone.

    before, layers >= from_layer                     after
    a.text = attention(q.text; k.visual + k.text)    a.text = attention(q.text; k.text)
    h.visual runs through attention and FFN          nothing: no output needs it

Softmax runs over the text keys alone and positions stay. An approximation: YOPO (arXiv 2410.06169, section 3.4,
eq. 7) and VTW (arXiv 2405.05803), which find that late layers hardly look at visual tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from foveate.errors import PassError
from foveate.ir.attention import Attention, attentions, looks_at_visual
from foveate.ir.program import info, outputs
from foveate.ir.rewriter import Rewriter
from foveate.passes.base import Pass, Skipped, count_of, first_blind_layer, layers_text, number, whole


@dataclass(frozen=True)
class CutVisual(Pass):
    """Layers from `from_layer` on see text only; or the `last` ones, as YOPO counts them.

    from_layer: 0 (the image is not seen at all) to the number of layers (nothing is cut); 0.5 is half of them. last: a
    number or share of layers in the same way. from_layer=auto: VTW's rule, the first layer from `floor` on at which a
    cut moves the first output token by a KL divergence of at most `eta`, on average over the samples of the statistics
    (stats: a file made by `foveate calibrate`). VTW: floor 5, eta 0.003 for LLaVA-1.5-7B, 0.0005 for 13B.
    """

    name: ClassVar[str] = "cut-visual"
    source: ClassVar[str] = "YOPO, arXiv 2410.06169, section 3.4; VTW, arXiv 2405.05803"

    from_layer: int | float | Literal["auto"] | None = None
    last: int | float | None = None
    eta: float = 0.003
    floor: int = 5
    stats: str | None = None

    def __post_init__(self) -> None:
        if (self.from_layer is None) == (self.last is None):
            raise PassError(f"{self.name}: give either from_layer or last, as in {self.name}{{from_layer=16}}")
        self.require(number(self.eta) and self.eta >= 0, "eta", "a divergence in nats, 0 or more")
        self.require(whole(self.floor) and self.floor >= 0, "floor", "a layer number, 0 or more")
        self.require(self.stats is None or isinstance(self.stats, str), "stats", "a file made by `foveate calibrate`")
        if self.stats is not None and self.from_layer != "auto":
            raise PassError(f"{self.name}: stats has no meaning here; it belongs to from_layer=auto")
        if self.from_layer == "auto":
            return
        if self.from_layer is not None:
            self.require_count_or_share("from_layer", "a layer number, or auto")
        else:
            self.require_count_or_share("last", "a number of layers")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        graph, layers = edit.graph, edit.program.info.layers
        if self.last is not None:
            first = layers - count_of(self.last, layers)
            if first < 0:
                raise PassError(f"{self.name}: last={self.last}, but the model has {layers} layers")
        elif self.from_layer == "auto":
            first = self._chosen(edit)
        else:
            first = self.require_layer(edit.program, "from_layer", end=1)
        already = first_blind_layer(graph)
        if first >= already:
            raise Skipped(
                f"no layer from {first} on sees visual tokens (the model has {layers} layers, "
                f"the first blind one is {already})"
            )
        late = [int(layer) for layer in outputs(graph)["kept"] if int(layer) >= first]
        if late:
            raise PassError(
                f"{self.name}: visual tokens are selected before layer {late[0]}, which would have none left after a "
                f"cut at {first}; select before the cut or cut later"
            )
        for node in attentions(graph, stream="text"):
            if info(node).layer >= first and looks_at_visual(node):
                edit.set_args(node, Attention.of(node).without_visual().args)
        result = dict(outputs(graph))
        result["kv"] = [
            entry if layer < first else [None, None, *entry[2:]] for layer, entry in enumerate(result["kv"])
        ]
        edit.output(result)
        edit.sweep()
        yield f"{layers_text(first, already - 1)}: text sees text only, visual tokens removed"

    def _chosen(self, edit: Rewriter) -> int:
        """The first layer that VTW's rule allows."""
        found = self.statistics(edit, self.stats, "from_layer=auto")
        means = (found.cut_kl / found.samples).tolist()
        allowed = means[self.floor :]
        if not allowed:
            raise Skipped(f"the model has {len(means)} layers, none from floor={self.floor} on; give a lower floor")
        for layer, mean in enumerate(allowed, self.floor):
            if mean <= self.eta:
                return layer
        raise Skipped(
            f"no cut from layer {self.floor} on moves the first token by at most eta={self.eta:g}; the least is "
            f"{min(allowed):.2g}"
        )
