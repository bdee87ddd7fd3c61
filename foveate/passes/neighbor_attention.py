"""Visual tokens look at their neighbours in the image only, and at the text before it.

    before                                      after
    a.visual = attention(q.visual; both)        a.visual = neighbor_attention(q.visual; both, coords, radius)
    a.text   = attention(q.text; both)          the same

Text looks at everything it did before, so keys, values and the cache stay. An approximation: YOPO (arXiv 2410.06169,
section 3.2, "neighbor-aware visual attention"). Its code overwrites the visual block of the mask, so that within the
window a token sees later ones too; `causal` keeps the order instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx

from foveate import ops
from foveate.errors import PassError
from foveate.ir.attention import Attention, Neighbors, attentions
from foveate.ir.program import NodeInfo, info
from foveate.ir.rewriter import Rewriter
from foveate.ir.select import coords_at
from foveate.passes.base import Pass, Skipped, layers_text, whole

METRICS = ("chebyshev", "euclidean", "raster")


@dataclass(frozen=True)
class NeighborAttention(Pass):
    """In `layers` (all, if not given), a visual token sees visual tokens of its image within `radius`, and text.

    radius: 0 or more, in tokens; metric: of the distance on the image's grid, `chebyshev` (a window of 2 radius + 1
    rows and columns), `euclidean`, or `raster` (along the sequence). causal: earlier tokens of the window only.
    see_prefix: whether the text before the image is seen. layers: layer numbers.
    """

    name: ClassVar[str] = "neighbor-attention"
    source: ClassVar[str] = "YOPO, arXiv 2410.06169, section 3.2"

    radius: int
    metric: Literal["chebyshev", "euclidean", "raster"] = "chebyshev"
    causal: bool = False
    see_prefix: bool = True
    layers: Any = None

    def __post_init__(self) -> None:
        self.require(whole(self.radius) and self.radius >= 0, "radius", "a number of tokens, 0 or more")
        self.require(self.metric in METRICS, "metric", ", ".join(METRICS))
        for option in ("causal", "see_prefix"):
            self.require(isinstance(getattr(self, option), bool), option, "true, false")
        if self.layers is not None:
            numbers = self.layers if isinstance(self.layers, (list, tuple)) else ()
            fits = len(numbers) > 0 and all(whole(n) and n >= 0 for n in numbers)
            self.require(fits, "layers", "layer numbers, as [0,1]")
            object.__setattr__(self, "layers", tuple(numbers))

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        wanted = range(edit.program.info.layers) if self.layers is None else self.layers
        beyond = [layer for layer in wanted if layer >= edit.program.info.layers]
        if beyond:
            last = edit.program.info.layers - 1
            raise PassError(f"{self.name}: layers={beyond[0]} is not a layer of this model; allowed: 0 to {last}")
        done = [layer for layer in sorted(wanted) if self._layer(edit, layer)]
        if not done:
            raise Skipped("no visual token looks at anything in these layers")
        edit.sweep()
        yield (
            f"{_ranges(done)}: visual tokens see their neighbours within {self.radius} ({self.metric}"
            f"{', earlier ones only' if self.causal else ''}){' and the text before' if self.see_prefix else ''}"
        )

    def _layer(self, edit: Rewriter, layer: int) -> bool:
        nodes = attentions(edit.graph, layer, "visual")
        for node in nodes:
            if node.target != ops.attention:
                raise PassError(f"{self.name}: visual tokens of layer {layer} look at their neighbours only already")
            self._replace(edit, node)
        return bool(nodes)

    def _replace(self, edit: Rewriter, node: fx.Node) -> None:
        old = Attention.of(node).checked(self.name, node)
        if old.keys != "vt":
            raise PassError(f"{self.name}: {node.name} reads the key streams {old.keys!r}, not visual and text")
        seen = slice(None if self.see_prefix else 1)
        about = info(node).with_(by=self.name, origin=(node.name,))
        with edit.before(node):
            new = Neighbors(
                q=old.q[0],
                k=old.k[seen],
                v=old.v[seen],
                q_order=old.q_order[0],
                k_order=old.k_order[seen],
                coords=coords_at(edit, old.q_order[0]),
                grids=edit.input("grids", ("images", 6), NodeInfo(-1, "grids"), device="cpu"),
                radius=self.radius,
                metric=self.metric,
                causal=self.causal,
                scale=old.scale,
            )
            edit.replace(node, edit.call(ops.neighbor_attention, *new.args, about=about))
        for score in [user for user in new.q.users if user.target == ops.received_attention]:
            edit.set_args(score, new.received)


def _ranges(layers: list[int]) -> str:
    whole_range = layers == list(range(layers[0], layers[-1] + 1))
    return layers_text(layers[0], layers[-1]) if whole_range else f"layers {', '.join(map(str, layers))}"
