"""Each key head keeps the last tokens and those that all others paid most to, while the answer grows.

    before                                  after, in every layer
    cache of layer l: k.visual, k.text      s = what all tokens pay to each key, summed, by key head
    a step caches one more key              cache of layer l: the `heavy` largest s, and the last `recent` tokens
                                            a step adds its row to s; one key leaves, and the new one takes its place

Sums are exact, and come out of the attention where both streams attend in one call (`foveate.ir.sums`). The prefill's
own result is as before; the answer's tokens look at what stays.
An approximation: H2O (arXiv 2306.14048, section 4), and "visual-text interactive pruning" of arXiv 2409.01162.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from foveate import ops
from foveate.ir.kv import cache_axes, hold, layer_keys, sums_of
from foveate.ir.program import NodeInfo
from foveate.ir.rewriter import Rewriter
from foveate.ir.select import first_of_layer
from foveate.passes.base import Pass


@dataclass(frozen=True)
class HeavyRecent(Pass):
    """A cache of at most `heavy` + `recent` tokens in every layer and key head, however long the answer is.

    Each is a number of tokens, or a share, above 0 and below 1, of those of a prompt that a layer has: heavy is rounded
    down and recent up, so that two halves are the whole. recent: 1 or more. Sums are over the query heads that share a
    key head, which so keep the same tokens. What leaves loses its sum; of equal sums the later token leaves.
    """

    name: ClassVar[str] = "heavy-recent"
    source: ClassVar[str] = "H2O, arXiv 2306.14048; arXiv 2409.01162"

    heavy: int | float = 0.5
    recent: int | float = 0.5

    def __post_init__(self) -> None:
        self.require_count_or_share("heavy", "a number of tokens")
        self.require_count_or_share("recent", "a number of tokens")
        self.require(self.recent > 0, "recent", "1 or more: a token must see itself")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        axes = cache_axes(edit.graph)
        for layer in range(edit.program.info.layers):
            keys = layer_keys(edit, layer)
            about = NodeInfo(layer, "cache", "joint", self.name)
            with edit.before(first_of_layer(edit.graph, layer + 1)):
                sums = sums_of(edit, keys, axes)
                chosen = edit.call(
                    ops.heavy_tokens, sums, keys.order, float(self.heavy), float(self.recent), about=about
                )
                index, *state = (edit.item(chosen, place, about) for place in range(4))
                hold(edit, keys, index, state)
        edit.sweep()
        shares = [isinstance(x, float) for x in (self.heavy, self.recent)]
        heavy = f"floor({self.heavy} x tokens)" if shares[0] else f"{self.heavy}"
        recent = f"ceil({self.recent} x tokens)" if shares[1] else f"{self.recent}"
        yield f"every layer caches at most {heavy} keys a head by what was paid to them, and the last {recent}"
