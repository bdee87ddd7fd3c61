"""What every trained selection shares: modules before some layers, which score visual tokens, and their weights.

    inference, before each of `layers`     s = score of each token that is left, by the module, [B, n] fp32
                                           layer l reads h.visual [floor(share * N)], best s, old order
    training, before each of `layers`      D = decide(s, noise, D before), [B, N], 1 or 0; nothing is removed
                                           from layer l on a visual key counts as much as its D

N are the visual tokens that reach the first of `layers`. The model's own weights stay as they are; modules have names
and a file of their own (`foveate.ir.modules`). `foveate.learn` trains them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from foveate import ops
from foveate.errors import PassError
from foveate.ir.attention import Attention, attentions, looks_at_visual
from foveate.ir.modules import MODULE, Modules, Shapes
from foveate.ir.program import ModelInfo, NodeInfo, Program, Stream, info, outputs
from foveate.ir.rewriter import Rewriter, shape
from foveate.ir.select import first_of_layer, hidden_into, keep_tokens, live_into, visual_order_at
from foveate.ir.tail import END
from foveate.passes.base import Pass, Skipped
from foveate.passes.select.selector import check_selection

aten = torch.ops.aten


class Stage:
    """What the module before `layer` may look at, and how its nodes are made, in front of that layer.

    visual [B, n, D], text [B, m, D]: hidden states that enter the layer; order, text_order: their orders. before: what
    earlier modules decided, fp32 [B, n], in training.
    """

    def __init__(self, edit: Rewriter, layer: int, name: str, before: fx.Node | None = None) -> None:
        self.edit, self.layer, self.name, self.before = edit, layer, name, before
        self.visual, self.text = hidden_into(edit, layer), hidden_into(edit, layer, "text")
        self.order = visual_order_at(edit.graph, layer)
        self.text_order = next(n for n in edit.graph.nodes if n.name == "text_order")

    def call(self, op: Any, *args: Any, stream: Stream = "visual") -> fx.Node:
        """Insert a call; stream: the tokens that its result belongs to."""
        return self.edit.call(op, *args, about=NodeInfo(self.layer, MODULE, stream, self.name))

    def weight(self, part: str) -> fx.Node:
        """A weight of this module."""
        return self.edit.weight(f"{self.name}.{self.layer}.{part}")

    def linear(self, x: fx.Node, part: str, bias: bool = True) -> fx.Node:
        """x through the linear `part`."""
        parts = [self.weight(f"{part}.weight"), *([self.weight(f"{part}.bias")] if bias else [])]
        return self.call(aten.linear.default, x, *parts, stream=info(x).stream)

    def norm(self, x: fx.Node, part: str) -> fx.Node:
        """x through the layer norm `part`."""
        weights = self.weight(f"{part}.weight"), self.weight(f"{part}.bias")
        size = int(shape(x)[-1])
        return self.call(aten.layer_norm.default, x, [size], *weights, 1e-5, False, stream=info(x).stream)

    def last_text(self, x: fx.Node) -> fx.Node:
        """Of a text value with tokens on axis 1 that of the prompt's last token; of an answer nothing is seen."""
        return self.call(aten.slice.Tensor, x, 1, -1, END, stream="text")

    def mean(self, x: fx.Node) -> fx.Node:
        """The mean [B, 1, D] of the visual tokens that are left."""
        decided = () if self.before is None else (self.before,)
        return self.call(ops.mean_token, x, self.order, *decided, stream="none")

    def score(self, x: fx.Node, part: str) -> fx.Node:
        """The linear `part` to two logits, keep and remove, and their difference: fp32 [B, n]."""
        logits = self.call(aten.to.dtype, self.linear(x, part), torch.float32)
        keep, remove = (self.call(aten.select.int, logits, 2, place) for place in (0, 1))
        return self.call(aten.sub.Tensor, keep, remove)


@dataclass(frozen=True)
class LearnedSelection(Pass):
    """Before the i-th of `layers`, the best floor(shares[i] * N) visual tokens stay, by a module's score.

    layers: rising. modules: the file of `foveate train`; a program without weights needs none.
    """

    paper: ClassVar[str] = ""
    """What the default layers are of, for the message that they do not fit."""

    distill: ClassVar[float] = 0.0
    """How much the divergence from the whole model counts in training."""

    layers: tuple[int, ...] = ()
    modules: str | None = None

    def __post_init__(self) -> None:
        self.require_layers("layers", "[1, 3, 5]")
        self.require(self.modules is None or isinstance(self.modules, str), "modules", "a file")

    @abstractmethod
    def shapes(self, about: ModelInfo) -> Shapes:
        """The weights of one module; PassError where it does not fit the model."""

    @abstractmethod
    def shares(self, stages: int) -> tuple[float, ...]:
        """Of N visual tokens, what stays behind each of so many stages."""

    @abstractmethod
    def scores(self, stage: Stage) -> fx.Node:
        """Insert a module: the score fp32 [B, n] of each visual token that enters its layer."""

    def stages(self, about: ModelInfo) -> tuple[int, ...]:
        """The layers that have a module before them; PassError for one that the model does not have."""
        if self.layers[-1] >= about.layers:
            raise PassError(
                f"{self.name}: layer {self.layers[-1]} is not one of this model's {about.layers}: give layers of 0 to "
                f"{about.layers - 1}{self.paper}"
            )
        return self.layers

    def rewrite(self, edit: Rewriter) -> Iterator[str]:
        """See the module's text."""
        stages = self.stages(edit.program.info)
        shares = self.shares(len(stages))
        if set(shares) == {1.0}:
            raise Skipped("every share is 1, which keeps every visual token")
        self._put(edit.program)
        reach = visual_order_at(edit.graph, stages[0])
        for layer, share in zip(stages, shares, strict=True):
            check_selection(self.name, edit, layer)
            live = live_into(edit.graph, layer)
            with edit.before(first_of_layer(edit.graph, layer)):
                scores = self.scores(Stage(edit, layer, self.name))
            keep_tokens(edit, layer, scores, share, live, reach)
            yield f"before layer {layer}: floor({share:g} x visual tokens) kept by a trained module"

    def mask(self, program: Program) -> None:
        """Edit a program into its training form: decisions are taken and weigh keys, and no token is removed.

        The prefill graph takes `noise_<layer>` fp32 [B, N] and returns `decisions`, by layer, and `visual_order`.
        """
        edit = Rewriter(program, program.prefill, by=self.name)
        if outputs(edit.graph)["kept"]:
            raise PassError(f"{self.name}: modules cannot be trained behind another selection in the decoder")
        self._put(program)
        decided: dict[int, fx.Node] = {}
        for layer in self.stages(program.info):
            check_selection(self.name, edit, layer)
            before = next(reversed(decided.values()), None)
            with edit.before(first_of_layer(edit.graph, layer)):
                stage = Stage(edit, layer, self.name, before)
                scores = self.scores(stage)
                noise = edit.placeholder(f"noise_{layer}", scores.meta["val"], NodeInfo(-1, "noise", "visual"))
                decided[layer] = stage.call(ops.decide, scores, noise, *([] if before is None else [before]))
            order = stage.order
        for node in attentions(edit.graph):
            layer = max((x for x in decided if x <= info(node).layer), default=-1)
            if layer >= 0 and looks_at_visual(node):
                self._weigh(edit, node, decided[layer])
        decisions = {str(layer): node for layer, node in decided.items()}
        edit.output({**outputs(edit.graph), "decisions": decisions, "visual_order": order})
        edit.sweep()

    def _weigh(self, edit: Rewriter, node: fx.Node, weights: fx.Node) -> None:
        if node.target != ops.attention:
            raise PassError(f"{self.name}: modules cannot be trained beside {info(node).by}; leave that out")
        seen = Attention.of(node).checked(self.name, node)
        with edit.before(node):
            args = (seen.q[0], seen.k, seen.v, seen.q_order[0], seen.k_order, weights, seen.scale)
            edit.replace(node, edit.call(ops.weighted_attention, *args, about=info(node)))

    def new(self, program: Program, seed: int) -> Modules:
        """Modules to begin with: those of the file, or untrained ones."""
        about = program.info
        shapes, stages = self.shapes(about), self.stages(about)
        if self.modules is None:
            return Modules.new(self.name, about, stages, shapes, seed, program.dtype)
        found = Modules.load(self.modules)
        found.check(self.name, about, stages, shapes, self.modules)
        return found

    def put(self, program: Program, modules: Modules) -> None:
        """Give a program the weights of modules, in its own type."""
        device, dtype = program.weights.device(), program.dtype
        for name, value in modules.tensors.items():
            program.weights.put(f"{self.name}.{name}", nn.Parameter(value.to(device, dtype), requires_grad=False))

    def _put(self, program: Program) -> None:
        """The modules of the file, unless the program has some; a program without weights gets their shapes."""
        if any(name.startswith(f"{self.name}.{self.stages(program.info)[0]}.") for name in program.weights.names):
            return
        if self.modules is None and program.weights.device().type != "meta":
            raise PassError(
                f"{self.name} needs modules=FILE: train them with `foveate train MODEL --part modules "
                f"--passes '{self.text()}' --data D -o FILE`"
            )
        self.put(program, self.new(program, 0))
