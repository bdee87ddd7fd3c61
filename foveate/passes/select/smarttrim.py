"""Keep the visual tokens that a small trained gate keeps, which compares each with its image and with the question.

    before each of `layers`      y = gelu(norm(h.visual) W1 + mean of norm(h.visual) that is left W2
                                          + norm(h.text of the prompt's last token) W3)
                                 s = keep - remove of y W4
                                 layer l reads h.visual [floor(share * N)], best s, old order

SmartTrim (arXiv 2305.15033, section 3), whose encoders have a CLS token for each modality; here the mean stands for
that of the image and the last token of the prompt for that of the text. It drops as many tokens as its gates say, so
that their number depends on the input; here it is fixed, which keeps graphs static. Its gates of heads, and the
curriculum that lowers the target step by step, are left out; the divergence from the whole model is in the loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from foveate.errors import PassError
from foveate.ir.modules import Shapes
from foveate.ir.program import ModelInfo
from foveate.passes.select.learned import LearnedSelection, Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class SmartTrim(LearnedSelection):
    """Before the i-th of S `layers`, floor((1 - (1 - keep) * i / S) * N) of N visual tokens stay, by a gate's score.

    N are those that reach the first of `layers`, i counts from 1. layers: rising; none stands for every layer but the
    first. keep: what is left behind the last, above 0, up to 1. modules: the file of `foveate train`.
    """

    name: ClassVar[str] = "smarttrim"
    source: ClassVar[str] = "SmartTrim, arXiv 2305.15033"
    distill: ClassVar[float] = 1.0

    keep: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_share("keep")

    def stages(self, about: ModelInfo) -> tuple[int, ...]:
        """As given, or all but the first layer."""
        if not self.layers and about.layers < 2:
            raise PassError(f"{self.name}: this model has one layer; say layers=[0] to select before it")
        return super().stages(about) if self.layers else tuple(range(1, about.layers))

    def shapes(self, about: ModelInfo) -> Shapes:
        """Three linears to half of the width, and the head."""
        size, half = about.hidden_size, about.hidden_size // 2
        norms: Shapes = {f"{norm}.{part}": (size,) for norm in ("norm", "norm_text") for part in ("weight", "bias")}
        cues: Shapes = {f"{part}.weight": (half, size) for part in ("own", "image", "text")}
        return {**norms, **cues, "own.bias": (half,), "head.weight": (2, half), "head.bias": (2,)}

    def shares(self, stages: int) -> tuple[float, ...]:
        """In equal steps down to `keep`."""
        return tuple(round(1 - (1 - self.keep) * (stage + 1) / stages, 9) for stage in range(stages))

    def scores(self, stage: Stage) -> fx.Node:
        """A linear of three values side by side is a sum of three linears."""
        x = stage.norm(stage.visual, "norm")
        asked = stage.norm(stage.last_text(stage.text), "norm_text")
        y = stage.linear(x, "own")
        for cue, part in ((stage.mean(x), "image"), (asked, "text")):
            y = stage.call(aten.add.Tensor, y, stage.linear(cue, part, bias=False))
        return stage.score(stage.call(aten.gelu.default, y), "head")
