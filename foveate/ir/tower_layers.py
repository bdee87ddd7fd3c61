"""Fewer tokens inside the vision tower.

Merging: a layer's tokens become fewer between its attention and its MLP.

    before                                    after
    h = x + attention(norm(x))   [I, n, C]    h = join(x + attention(norm(x)), into, weight)   [I, n - r, C]
    x' = h + mlp(norm(h))        [I, n, C]    x' = h + mlp(norm(h))                            [I, n - r, C]

Cutting: where an image's number of tokens depends on the image, the tower becomes two graphs, and the number is settled
between them, so that both keep plain dynamic axes. Images with fewer tokens than others are padded.

    before                                    after
    vision: pixels -> layers -> out           vision: pixels -> layers -> x [I, 1 + N, C], places [I, N], count [I]
                                              vision_rest: x, places [I, k], count -> layers on [I, 1 + k, C] -> out

Both are sound because all but attention works on each token alone, and a layer hands on nothing but x'.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from foveate import ops
from foveate.errors import PassError
from foveate.ir.program import TOWER, NodeInfo, args_of, info, outputs
from foveate.ir.rewriter import Rewriter, map_arg, shape
from foveate.ir.tail import END
from foveate.ir.vision import Tower, aten


@dataclass(frozen=True)
class Layer:
    """A layer that the features come from: its attention, and the sum behind that."""

    number: int
    attention: fx.Node
    residual: fx.Node

    @property
    def keys(self) -> fx.Node:
        """[I, H, n, e]."""
        node: fx.Node = args_of(self.attention)[1]
        return node

    @property
    def entering(self) -> fx.Node:
        """The hidden states that enter the layer: [I, n, C]."""
        node: fx.Node = args_of(self.residual)[0]
        return node

    @property
    def tokens(self) -> int:
        """How many tokens the layer takes, CLS included."""
        return int(shape(self.keys)[2])


def layers_of(tower: Tower) -> list[Layer]:
    """The tower's layers. PassError where tokens were selected before, or where the features are not one layer's."""
    tower.check_single()
    tower.check_whole()
    tower.check_attends()
    if tower.tokens.target != aten.slice.Tensor:
        raise PassError(
            f"{tower.name}: the features come from several layers, which would not have equally many tokens"
        )
    return [Layer(info(node).layer, node, _residual(node)) for node in tower.attentions]


class Merger:
    """Merges tokens layer by layer, from the first to the last, on behalf of a pass.

    source int64 [I, n]: the place on the grid of each token (-1: CLS); size fp32 [I, n], how many patches each stands
    for, or None while all stand for one. New nodes go where the caller says.
    """

    def __init__(self, tower: Tower, layers: list[Layer]) -> None:
        self.tower, self.edit = tower, tower.edit
        with self.edit.before(layers[0].attention):
            places = self.call(layers[0], ops.places, layers[0].entering)
            self.source = self.call(layers[0], aten.add.Scalar, places, -1)
        self.size: fx.Node | None = None

    def about(self, layer: Layer) -> NodeInfo:
        """Why a node that merges is there."""
        return NodeInfo(layer.number, "merge", "none", self.edit.by)

    def call(self, layer: Layer, op: object, *args: object) -> fx.Node:
        """Insert a call for a layer."""
        return self.edit.call(op, *args, about=self.about(layer))

    def weigh(self, layer: Layer) -> None:
        """Let a key count as often as the patches it stands for: proportional attention."""
        if self.size is not None:
            with self.edit.before(layer.attention):
                bias = self.call(layer, aten.log.default, self.size)
            self.edit.set_args(layer.attention, (*args_of(layer.attention)[:4], bias))

    def merge(self, layer: Layer, matched: fx.Node, merge: int) -> None:
        """Merge `merge` tokens behind a layer's attention, as a matching says (`foveate.ops.tome`)."""
        edit = self.edit
        with edit.after(matched):
            into, weight, size, source = (edit.item(matched, place, self.about(layer)) for place in range(4))
            joined = self.call(layer, ops.join_tokens, layer.residual, into, weight, merge)
        edit.replace(layer.residual, joined)
        self.size, self.source = size, source
        edit.refresh()

    def finish(self) -> None:
        """Say what the features' tokens stand for."""
        with self.edit.before(self.tower.end):
            self.tower.become(self.tower.tokens, self.tower.call(aten.slice.Tensor, self.source, 1, 1, END))


def renew_last(edit: Rewriter, layer: Layer, vectors: fx.Node | None, first: bool) -> None:
    """The last token that enters a layer is what it was, without its gradient, plus the layer's vector [layers, C].

    first: there is no such token yet; it starts as CLS.
    """
    about = NodeInfo(layer.number, "cross")
    x, readers = layer.entering, list(layer.entering.users)
    with edit.after(x):
        start, others = (0, x) if first else (-1, edit.call(aten.slice.Tensor, x, 1, 0, -1, about=about))
        cross = edit.call(aten.slice.Tensor, x, 1, start, 1 if first else END, about=about)
        cross = edit.call(aten.detach.default, cross, about=about)
        if vectors is not None:
            vector = edit.call(aten.slice.Tensor, vectors, 0, layer.number, layer.number + 1, about=about)
            cross = edit.call(aten.add.Tensor, cross, vector, about=about)
        new = edit.call(aten.cat.default, [others, cross], 1, about=about)
    edit.replace(x, new, where=readers.__contains__)
    edit.refresh()


def cut(tower: Tower, layer: Layer, chosen: tuple[fx.Node, fx.Node]) -> None:
    """From `layer` on, the tower runs on CLS and the first `count` of the `places`, which are `chosen`."""
    edit, program = tower.edit, tower.edit.program
    hidden = layer.entering
    rest = Rewriter(program, fx.Graph(), edit.by)
    x = rest.placeholder("hidden", hidden.meta["val"], NodeInfo(-1, "hidden"))
    places = rest.input("places", ("images", "kept_tokens"), NodeInfo(-1, "places"))
    count = rest.input("count", ("images",), NodeInfo(-1, "count"))
    about = NodeInfo(layer.number, "select")
    patches = rest.call(ops.take_tokens, x, rest.call(aten.add.Scalar, places, 1, about=about), 1, about=about)
    left = rest.call(aten.cat.default, [rest.call(aten.slice.Tensor, x, 1, 0, 1, about=about), patches], 1, about=about)
    bias = rest.call(ops.padded_keys, left, count, about=about)
    twins = {hidden: left}
    for node in edit.graph.nodes:
        if node.op == "get_attr" and any(info(user).layer >= layer.number for user in node.users):
            twins[node] = rest.weight(str(node.target))
        elif node.op == "call_function" and info(node).layer >= layer.number:
            args = map_arg(node.args, twins.__getitem__)
            more = (bias,) if node.target == ops.encoder_attention else ()
            twins[node] = rest.call(node.target, *args, *more, about=info(node), **dict(node.kwargs))
    rest.output({"out": twins[outputs(edit.graph)["out"]], "source": places, "count": count})
    edit.output({"out": hidden, "source": chosen[0], "count": chosen[1]})
    edit.sweep()
    edit.events.update(rest.events)
    graphs = {**program.graphs, "vision_rest": rest.graph}
    program.graphs = {name: graphs[name] for name in sorted(graphs, key=lambda name: name not in TOWER)}


def _residual(attention: fx.Node) -> fx.Node:
    node = attention
    while node.target != aten.add.Tensor:
        node = next(iter(node.users))
    return node
