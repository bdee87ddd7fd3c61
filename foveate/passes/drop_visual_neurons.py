"""Visual tokens use a part of each FFN; text uses all of it.

    before                                       after, k = floor(keep * neurons)
    y.visual = down(silu(gate(x)) * up(x))       y.visual = down[:, :k](silu(gate[:k](x)) * up[:k](x))

The slices are views. Wide FFNs keep a multiple of 64, because matmuls of other widths leave part of a GPU idle. For any
choice but the first k neurons, the neurons are first reordered so that the kept ones stand in front, which does not
change the function. An approximation: YOPO (arXiv 2410.06169, section 3.2, "sparse visual projection in FFN"; its code
keeps the first m/r neurons, its text says random).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from foveate import ops
from foveate.errors import PassError
from foveate.ir.rewriter import Rewriter, nodes_of
from foveate.ir.weights import permute, read_weight, slice_weight
from foveate.passes.base import Pass, Skipped, layers_text, number, whole

SELECT = ("prefix", "random", "magnitude", "activity")
WIDE, TILE = 4096, 64
"""FFNs of so many neurons keep a multiple of TILE; what that adds is at most 1/64 of them."""


@dataclass(frozen=True)
class DropVisualNeurons(Pass):
    """Visual tokens use floor(keep * intermediate size) FFN neurons in layers from `from_layer` on.

    keep: above 0, up to 1. multiple_of: the count is rounded up to a multiple of this; by default 64 where there are
    at least 4096 neurons, else 1. select: `prefix`, the first ones (YOPO's code); `random` by `seed` (its text);
    `magnitude`, those with the largest product of the norms of their gate, up and down weights; `activity`, those with
    the largest mean |activation| at visual tokens, from the statistics that `foveate calibrate` made (stats: the file).
    """

    name: ClassVar[str] = "drop-visual-neurons"
    source: ClassVar[str] = "YOPO, arXiv 2410.06169, section 3.2"

    keep: float = 0.5
    select: Literal["prefix", "random", "magnitude", "activity"] = "prefix"
    seed: int = 0
    from_layer: int = 0
    multiple_of: int | None = None
    stats: str | None = None

    def __post_init__(self) -> None:
        self.require(number(self.keep) and 0 < self.keep <= 1, "keep", "above 0, at most 1")
        self.require(self.select in SELECT, "select", ", ".join(SELECT))
        self.require(self.stats is None or isinstance(self.stats, str), "stats", "a file made by `foveate calibrate`")
        if self.stats is not None and self.select != "activity":
            raise PassError(f"{self.name}: stats has no meaning here; it belongs to select=activity")
        self.require(
            self.multiple_of is None or (whole(self.multiple_of) and self.multiple_of > 0),
            "multiple_of",
            "a number of neurons, 1 or more",
        )
        self.require(whole(self.seed) and 0 <= self.seed < 2**31, "seed", "0 to 2**31 - 1")
        self.require(whole(self.from_layer) and self.from_layer >= 0, "from_layer", "a layer number, 0 or more")

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        model = edit.program.info
        self.require_layer(edit.program, "from_layer")
        wanted = math.floor(self.keep * model.intermediate_size)
        if wanted == 0:
            raise PassError(
                f"{self.name}: keep={self.keep} of {model.intermediate_size} neurons is none; keep at least 1"
            )
        unit = self.multiple_of or (TILE if model.intermediate_size >= WIDE else 1)
        kept = min(math.ceil(wanted / unit) * unit, model.intermediate_size)
        if kept == model.intermediate_size:
            raise Skipped("every neuron is kept")
        active = None
        if self.select == "activity":
            active = self.statistics(edit, self.stats, "select=activity").neurons
        done = [layer for layer in range(self.from_layer, model.layers) if self._layer(edit, layer, kept, active)]
        if not done:
            raise Skipped(f"no layer from {self.from_layer} on has visual FFN work left")
        edit.refresh()
        edit.sweep()
        yield (
            f"{layers_text(done[0], done[-1])}: visual gate/up/down {model.intermediate_size} -> {kept} neurons "
            f"({self.select}{'' if kept == wanted else f', {wanted} rounded up to a multiple of {unit}'})"
        )

    def _layer(self, edit: Rewriter, layer: int, kept: int, active: Tensor | None) -> bool:
        roles = edit.program.info.roles
        linears = {
            part: nodes_of(edit.graph, stream="visual", role=roles[part], layer=layer, op=torch.ops.aten.linear.default)
            for part in ("gate", "up", "down")
        }
        if nodes_of(edit.graph, stream="visual", layer=layer, op=ops.experts):
            raise PassError(
                f"{self.name}: in layer {layer} each token chooses its experts, which use few neurons as it is; prune "
                "tokens, heads or late layers instead"
            )
        if not linears["down"]:
            return False
        if edit.program.info.intermediate_size != linears["gate"][0].meta["val"].shape[-1]:
            raise PassError(f"{self.name}: layer {layer} already has part of its visual neurons dropped")
        if self.select != "prefix":
            weights = [read_weight(edit.program, linears[part][0]) for part in ("gate", "up", "down")]
            order = self._order(weights, layer, kept, None if active is None else active[layer])
            for part, dim in (("gate", 0), ("up", 0), ("down", 1)):
                permute(edit.program, linears[part][0], order, dim)
        for part, dim in (("gate", 0), ("up", 0), ("down", 1)):
            slice_weight(edit, linears[part][0], dim, kept)
        return True

    def _order(self, weights: list[Tensor], layer: int, kept: int, active: Tensor | None) -> Tensor:
        """All neurons, kept ones in front, each part in its old order."""
        gate, up, down = weights
        if gate.is_meta:
            return torch.arange(gate.shape[0])
        if active is not None:
            score = active
        elif self.select == "random":
            generator = torch.Generator().manual_seed(self.seed * 1009 + layer)
            score = torch.rand(gate.shape[0], generator=generator)
        else:
            score = gate.float().norm(dim=1) * up.float().norm(dim=1) * down.float().norm(dim=0)
        best = score.argsort(descending=True, stable=True)
        return torch.cat([best[:kept].sort().values, best[kept:].sort().values]).to(gate.device)
