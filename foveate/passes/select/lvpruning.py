"""Keep the visual tokens that small trained modules keep, which let visual tokens read the text.

    before each of `layers`      x = h.visual; twice: q = x Wq; k, v = h.text Wk, h.text Wv
                                                      o = softmax(q k) v Wo + q;  x = norm(silu(norm(o) W1) W2)
                                 s = logit to keep - logit to remove, of x
                                 layer l reads h.visual [floor((ratio - i * step) * N)], best s, old order

LVPruning (NAACL Findings 2025, arXiv 2501.13652, section 3), whose modules stand behind the 1st, 8th and 16th of 32
layers. Wo is not in its equations; its count of FLOPs has it. Positions are kept, and all text is read, that before the
image too; the answer is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from foveate import ops
from foveate.errors import PassError
from foveate.ir.modules import Shapes
from foveate.ir.program import ModelInfo
from foveate.passes.base import number
from foveate.passes.select.learned import LearnedSelection, Stage

aten = torch.ops.aten

HEADS = 8
BLOCKS = 2


@dataclass(frozen=True)
class LVPruning(LearnedSelection):
    """Before the i-th of `layers`, floor((ratio - i * step) * N) of N visual tokens stay, by a module's score.

    N are those that reach the first of `layers`, i counts from 0. layers: rising; a model with fewer than 17 needs its
    own. ratio and step may differ from those in training. modules: the file of `foveate train`.
    """

    name: ClassVar[str] = "lvpruning"
    source: ClassVar[str] = "LVPruning, arXiv 2501.13652"
    paper: ClassVar[str] = " (the paper's 1, 8, 16 are of 32)"

    layers: tuple[int, ...] = (1, 8, 16)
    ratio: float = 0.5
    step: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.layers), "layers", "one layer or more")
        self.require_share("ratio")
        least = number(self.step) and self.step >= 0 and min(self.shares(len(self.layers))) > 0
        self.require(least, "step", f"0 or more, and small enough that ratio - {len(self.layers) - 1} step is above 0")

    def shapes(self, about: ModelInfo) -> Shapes:
        """Two blocks and the head."""
        size = about.hidden_size
        if size % HEADS:
            raise PassError(f"{self.name}: a hidden size of {size} cannot be shared out to {HEADS} heads")
        square, vector = (size, size), (size,)
        block: Shapes = {f"{name}.weight": square for name in "qkvo"}
        block |= {f"{norm}.{part}": vector for norm in ("norm1", "norm2") for part in ("weight", "bias")}
        block |= {"up.weight": (2 * size, size), "up.bias": (2 * size,)}
        block |= {"down.weight": (size, 2 * size), "down.bias": vector}
        blocks = {f"blocks.{i}.{name}": shape for i in range(BLOCKS) for name, shape in block.items()}
        return {**blocks, "head.weight": (2, size), "head.bias": (2,)}

    def shares(self, stages: int) -> tuple[float, ...]:
        """Rounded, so that 0.6 - 2 * 0.2 is 0.2 and not a hair less."""
        return tuple(round(self.ratio - stage * self.step, 9) for stage in range(stages))

    def scores(self, stage: Stage) -> fx.Node:
        """Both blocks read the same text."""
        until = stage.last_text(stage.text_order)
        x = stage.visual
        for block in range(BLOCKS):
            x = self._block(stage, x, until, f"blocks.{block}.")
        return stage.score(x, "head")

    def _block(self, stage: Stage, x: fx.Node, until: fx.Node, prefix: str) -> fx.Node:
        q, k, v = (
            stage.linear(y, f"{prefix}{name}", bias=False) for y, name in zip((x, stage.text, stage.text), "qkv")
        )
        size = stage.edit.program.info.hidden_size // HEADS
        heads = [self._heads(stage, y, size) for y in (q, k, v)]
        seen = stage.call(ops.cross_attention, *heads, until, stage.text_order, size**-0.5)
        out = stage.linear(stage.call(aten.flatten.using_ints, seen, 2, 3), f"{prefix}o", bias=False)
        out = stage.norm(stage.call(aten.add.Tensor, out, q), f"{prefix}norm1")
        inner = stage.call(aten.silu.default, stage.linear(out, f"{prefix}up"))
        return stage.norm(stage.linear(inner, f"{prefix}down"), f"{prefix}norm2")

    def _heads(self, stage: Stage, x: fx.Node, size: int) -> fx.Node:
        stream = x.meta["foveate"].stream
        split = stage.call(aten.unflatten.int, x, 2, [HEADS, size], stream=stream)
        return stage.call(aten.transpose.int, split, 1, 2, stream=stream)
