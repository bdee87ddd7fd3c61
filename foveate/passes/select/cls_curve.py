"""Cut the patches that are least like CLS after a few layers of the vision tower, as many as the image says.

    before                                   after
    layer l reads x [I, 1 + N, C]            d = softmax(CLS x patches / sqrt(C)), sorted: a curve that falls
                                             i = where it turns: the largest (N - i) (d_1 - d_i)
                                             layer l and all behind read CLS and the best (1 + alpha) i, in old order

The first stage of image-text interaction pruning (arXiv 2409.01162, section 3.1). The paper multiplies i by alpha =
0.075, which leaves 2 to 10 tokens (`literal`) where its tables have 127; `expand` gives numbers of that size, and
`floor_add` adds alpha * N. Hidden states are compared as they are, without heads. Positions close in the decoder.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from foveate import ops
from foveate.ir.program import NodeInfo
from foveate.ir.rewriter import Rewriter
from foveate.ir.tower_layers import cut, layers_of
from foveate.ir.vision import Tower
from foveate.passes.base import Pass, number, whole

MODES = ("expand", "literal", "floor_add")


@dataclass(frozen=True)
class CLSCurve(Pass):
    """Behind `layer` layers of the tower an image keeps as many of its N patches as its curve's turn i says.

    alpha_mode: `expand` keeps ceil((1 + alpha) i), `literal` ceil(alpha i), `floor_add` i + ceil(alpha N), with alpha 0
    to 1; at least one, at most all.
    """

    name: ClassVar[str] = "cls-curve"
    source: ClassVar[str] = "image-text interaction, arXiv 2409.01162"
    graph: ClassVar[str] = "vision"

    layer: int = 3
    alpha: float = 0.075
    alpha_mode: str = "expand"

    def __post_init__(self) -> None:
        self.require(whole(self.layer) and self.layer >= 0, "layer", "a number of tower layers, 0 or more")
        self.require(number(self.alpha) and 0 <= self.alpha <= 1, "alpha", "0 to 1")
        self.require(self.alpha_mode in MODES, "alpha_mode", ", ".join(MODES))

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        tower = Tower(edit, self.name)
        layers = layers_of(tower)
        self.require(self.layer < len(layers), "layer", f"0 to {len(layers) - 1}, of the layers behind the features")
        layer = layers[self.layer]
        about = NodeInfo(self.layer - 1, "select")
        with edit.after(layer.entering):
            chosen = edit.call(ops.cls_curve, layer.entering, float(self.alpha), self.alpha_mode, about=about)
            places, count = (edit.item(chosen, place, about) for place in (0, 1))
        cut(tower, layer, (places, count))
        yield (
            f"behind {self.layer} layers of the vision tower: as many visual tokens are left as each image's curve of "
            f"likeness to CLS says; {len(layers) - self.layer} layers run on those"
        )
