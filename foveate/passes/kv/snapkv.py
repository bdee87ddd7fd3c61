"""Behind the prefill, each key head keeps the last tokens and those that they look at most.

    before                                  after, in every layer
    cache of layer l: k.visual, k.text      s = what the last `window` tokens pay to each key, by key head
                                            cache of layer l: the best of the earlier keys by s, and the last `window`

Rows are exact: softmax over all that those tokens see, and only their rows are computed. The prefill's own result is as
before; the tokens of the answer look at what stays. An approximation: SnapKV (arXiv 2404.14469, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from foveate import ops
from foveate.ir.kv import cache_axes, hold, layer_keys, sums_of
from foveate.ir.program import NodeInfo
from foveate.ir.rewriter import Rewriter
from foveate.ir.select import first_of_layer
from foveate.passes.base import Pass, whole


@dataclass(frozen=True)
class SnapKV(Pass):
    """A cache of `capacity` tokens of the prompt in every layer and key head, and of the answer.

    capacity: a number of tokens above `window`, or a share, above 0 and below 1, of those that a layer has (at least
    `window`); a prompt that is not longer is kept whole. window: tokens at the end of a prompt, visual ones too, that
    stay and decide. kernel: odd, earlier tokens over which scores are pooled, in the order of the prompt; pooling:
    `avg` or `max`. Scores are summed over the query heads that share a key head, which so keep the same tokens.
    """

    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "SnapKV, arXiv 2404.14469"

    capacity: int | float = 2048
    window: int = 32
    kernel: int = 5
    pooling: Literal["avg", "max"] = "avg"

    def __post_init__(self) -> None:
        self.require(whole(self.window) and self.window >= 1, "window", "a number of tokens, 1 or more")
        share = isinstance(self.capacity, float) and 0 < self.capacity < 1
        self.require(
            share or (whole(self.capacity) and self.capacity > self.window),
            "capacity",
            f"a number of tokens above window={self.window}, or a share of them between 0 and 1, such as 0.5",
        )
        self.require(whole(self.kernel) and self.kernel > 0 and self.kernel % 2 == 1, "kernel", "an odd number")
        self.require(self.pooling in ("avg", "max"), "pooling", "avg, max")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        axes = cache_axes(edit.graph)
        for layer in range(edit.program.info.layers):
            keys = layer_keys(edit, layer)
            about = NodeInfo(layer, "cache", "joint", self.name)
            with edit.before(first_of_layer(edit.graph, layer + 1)):
                scores = sums_of(edit, keys, axes, self.window)
                how = (float(self.capacity), self.window, self.kernel, self.pooling)
                chosen = edit.call(ops.snapkv_tokens, scores, keys.order, *how, about=about)
                hold(edit, keys, edit.item(chosen, 0, about), [edit.item(chosen, 1, about)])
        edit.sweep()
        what = f"floor({self.capacity} x tokens)" if isinstance(self.capacity, float) else f"{self.capacity}"
        yield f"every layer caches at most {what} keys a head of the prompt, chosen by the last {self.window} tokens"
