"""Keep the visual tokens that a small trained MLP keeps, which compares each with the mean of all that are left.

    before each of `layers`      x = gelu(norm(h.visual) W1); local, global = halves of x
                                 y = gelu([local, mean of global] W2); s = keep - remove of gelu(y W3) W4
                                 layer l reads h.visual [floor(keep ** stage * N)], best s, old order

DynamicViT (arXiv 2106.02034, section 3.2), made for vision transformers of 12 layers: there before layers 3, 6 and 9.
Here it chooses among the visual tokens of a decoder, and does not see the text. Its loss on tokens that stay is left
out; the divergence from the whole model is in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from foveate.ir.modules import Shapes
from foveate.ir.program import ModelInfo
from foveate.passes.select.learned import LearnedSelection, Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class DynamicViT(LearnedSelection):
    """Before the i-th of `layers`, floor(keep ** i * N) of N visual tokens stay, by a module's score.

    N are those that reach the first of `layers`, i counts from 1. layers: rising; none stands for a quarter, a half and
    three quarters of the model. keep: above 0, up to 1. modules: the file of `foveate train`.
    """

    name: ClassVar[str] = "dynamicvit"
    source: ClassVar[str] = "DynamicViT, arXiv 2106.02034"
    distill: ClassVar[float] = 0.5

    keep: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_share("keep")

    def stages(self, about: ModelInfo) -> tuple[int, ...]:
        """As given, or three of equal distance."""
        return super().stages(about) if self.layers else quarters(about.layers)

    def shapes(self, about: ModelInfo) -> Shapes:
        """An MLP of four linears, whose second reads the local and the global half apart."""
        size, half, fourth = about.hidden_size, about.hidden_size // 2, about.hidden_size // 4
        return {
            **{f"norm.{part}": (size,) for part in ("weight", "bias")},
            **{"local.weight": (half, size), "local.bias": (half,)},
            **{"whole.weight": (half, size), "whole.bias": (half,)},
            **{"own.weight": (half, half), "own.bias": (half,), "mean.weight": (half, half)},
            **{"down.weight": (fourth, half), "down.bias": (fourth,)},
            **{"head.weight": (2, fourth), "head.bias": (2,)},
        }

    def shares(self, stages: int) -> tuple[float, ...]:
        """Powers of `keep`."""
        return tuple(float(self.keep ** (stage + 1)) for stage in range(stages))

    def scores(self, stage: Stage) -> fx.Node:
        """The halves of W1 and of W2 are weights of their own."""
        x = stage.norm(stage.visual, "norm")
        local, whole = (stage.call(aten.gelu.default, stage.linear(x, part)) for part in ("local", "whole"))
        mean = stage.linear(stage.mean(whole), "mean", bias=False)
        both = stage.call(aten.add.Tensor, stage.linear(local, "own"), mean)
        inner = stage.linear(stage.call(aten.gelu.default, both), "down")
        return stage.score(stage.call(aten.gelu.default, inner), "head")


def quarters(layers: int) -> tuple[int, ...]:
    """A quarter, a half and three quarters of so many layers."""
    return tuple(dict.fromkeys(layers * quarter // 4 for quarter in (1, 2, 3)))
