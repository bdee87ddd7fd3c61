"""Keep fewer and fewer visual tokens, stage by stage, by what the last text token looks at next.

    before                              after, before each of `layers`
    layer l: k.visual = f(h.visual)     k.visual = f(h.visual)                  of all that reach the layer
    layer l: reads h.visual [n]         s = row of the last text token in layer l itself, summed over heads
                                        layer l reads h.visual and k.visual [floor(keep ** stage * Nv)], best s

PyramidDrop (arXiv 2410.17247, section 3.2). Positions are kept, which its text does not say and its code does not do:
so the keys that give the score are the layer's own, and nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from foveate.errors import PassError
from foveate.ir.attention import Attention, attentions, looks_at_visual
from foveate.ir.program import NodeInfo, info
from foveate.ir.rewriter import Rewriter
from foveate.ir.select import keep_tokens, live_beside, made_in, visual_order_at
from foveate.passes.base import Pass
from foveate.passes.select.rows import last_row
from foveate.passes.select.selector import check_removes, check_selection


@dataclass(frozen=True)
class PyramidDrop(Pass):
    """Before the i-th of `layers`, floor(keep ** i * n) of the n visual tokens that reach the first of them stay.

    layers: rising, 0 or more; none stands for a quarter, a half and three quarters of the model. keep: above 0, up
    to 1.
    """

    name: ClassVar[str] = "pyramiddrop"
    source: ClassVar[str] = "PyramidDrop, arXiv 2410.17247"

    layers: tuple[int, ...] = ()
    keep: float = 0.5

    def __post_init__(self) -> None:
        self.require_layers("layers", "[8, 16, 24]")
        self.require_share("keep")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        check_removes(self.keep)
        count = edit.program.info.layers
        stages = self.layers or tuple(dict.fromkeys(count * quarter // 4 for quarter in (1, 2, 3)))
        if stages[-1] >= count:
            raise PassError(f"{self.name}: layer {stages[-1]} is not one of this model's {count}: 0 to {count - 1}")
        reach = visual_order_at(edit.graph, stages[0])
        for stage, layer in enumerate(stages, 1):
            check_selection(self.name, edit, layer)
            share = float(self.keep**stage)
            self._stage(edit, layer, share, reach)
            yield f"before layer {layer}: floor({share:g} x visual tokens) kept by the last text token's attention"

    def _stage(self, edit: Rewriter, layer: int, keep: float, reach: fx.Node) -> None:
        graph = edit.graph
        rows = [n for n in attentions(graph, layer, "text") if looks_at_visual(n)]
        if not rows:
            raise PassError(f"{self.name}: no head of layer {layer} looks at visual tokens, so there is no score")
        seen = Attention.of(rows[0])
        needed = made_in(layer, [seen.q[0], *seen.k])
        live = live_beside(graph, layer, needed)
        # What the score needs comes first, so that everything else in the layer can work on what is left.
        start = next(n for n in graph.nodes if n.op == "call_function" and info(n).layer >= layer and n not in needed)
        edit.hoist([n for n in graph.nodes if n in needed], start)
        with edit.before(start):
            scores = last_row(edit, rows[0], NodeInfo(layer, "select", "visual", self.name))
        keep_tokens(edit, layer, scores, keep, live, reach)
