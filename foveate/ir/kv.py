"""Evicting keys and values behind a prefill: which there are, what queries pay to them, and what is left.

    before                                         after
    layer l's keys k.visual, k.text are cached     s = what queries of layer l pay to each key, by key head
                                                   held = take_keys([k.visual, k.text], best s), the same for values
    a.text = attention(q.text; k.visual + k.text)  the same: only the cache is another

The prefill itself attends to everything; what it returns of layer l is one block of both streams, [B, Hk, C, e], with
the place of each token in each head, [B, Hk, C]. Decoding reads the block in the place of its two streams; a policy
that goes on evicting is told what each step pays to the keys (`scores`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from foveate import ops
from foveate.errors import PassError
from foveate.ir.attention import Attention, Neighbors, attentions, taken_apart
from foveate.ir.program import LayerKV, NodeInfo, args_of, info, layer_kv, outputs
from foveate.ir.rewriter import Rewriter, map_arg, shape
from foveate.ir.select import coords_at, token_inputs
from foveate.ir.tokens import Axes, takes_last, token_axes


@dataclass(frozen=True)
class LayerKeys:
    """What the text of a layer attends to, a list entry a stream: keys, values, orders; streams: such as `vt`."""

    layer: int
    streams: str
    k: list[fx.Node]
    v: list[fx.Node]
    order: list[fx.Node]
    scale: float


def layer_keys(edit: Rewriter, layer: int) -> LayerKeys:
    """What a layer caches; PassError where heads see different tokens, or not all that come before."""
    node, *more = attentions(edit.graph, layer, "text")
    seen, cached = Attention.of(node).checked(edit.by, node), layer_kv(edit.graph)[layer]
    pairs = [pair for pair in (cached.visual, cached.text) if pair]
    if more or list(zip(seen.k, seen.v, strict=True)) != pairs:
        raise PassError(
            f"{edit.by}: some heads of layer {layer} see no visual tokens, so its heads have not the same tokens to "
            "keep; leave out drop-visual-heads"
        )
    return LayerKeys(layer, seen.keys, seen.k, seen.v, seen.k_order, seen.scale)


def sums_of(edit: Rewriter, keys: LayerKeys, axes: Axes, window: int | None = None) -> fx.Node:
    """What the tokens of a layer pay to its keys, summed: fp32 [B, Hk, all keys], streams one after another.

    window: only the last so many tokens of a row ask. axes: of the graph, before it was edited.
    """
    parts = [_sums(edit, keys, axes, place, window) for place in range(len(keys.k))]
    total = parts[0]
    for part in parts[1:]:
        total = edit.call(torch.ops.aten.add.Tensor, total, part, about=info(total))
    return total


def hold(edit: Rewriter, keys: LayerKeys, index: fx.Node, state: list[fx.Node]) -> None:
    """Let the prefill return the chosen keys and values alone, index int64 [B, Hk, C]; state: places, and more."""
    about = NodeInfo(keys.layer, "kv", "joint", edit.by)
    block = [edit.call(ops.take_keys, x, index, about=about) for x in (keys.k, keys.v)]
    result: dict[str, Any] = dict(outputs(edit.graph))
    entries = list(result["kv"])
    entries[keys.layer] = [*block, None, None]
    edit.output({**result, "kv": entries, "held": {**result.get("held", {}), str(keys.layer): state}})


def held_names(graph: fx.Graph) -> dict[int, str]:
    """Layer -> the name of the size of what is held of it in decoding; layers that hold as much share one."""
    names: dict[Any, str] = {}
    found = {}
    for layer, cached in enumerate(layer_kv(graph)):
        if cached.held:
            found[layer] = names.setdefault(_length(cached.held[0], 2), f"held_{layer}")
    return found


def evicts_in_steps(layer: LayerKV) -> bool:
    """Whether decode steps evict keys from what is held of a layer; otherwise they add the answer's behind it."""
    if layer.held is None:
        return False
    index = args_of(layer.held[0])[1]
    return bool(args_of(index)[0].target == ops.heavy_tokens)


def cache_axes(graph: fx.Graph) -> Axes:
    """The token axes of a prefill graph."""
    return token_axes(graph, token_inputs(graph))


def _sums(edit: Rewriter, keys: LayerKeys, axes: Axes, place: int, window: int | None) -> fx.Node:
    """What the queries of one stream pay to the keys of all."""
    visual = keys.streams[place] == "v"
    about = NodeInfo(keys.layer, "cache", "joint", edit.by)
    order, columns = keys.order[place], None
    if window is not None:
        others = [x for x in keys.order if x is not order]
        chosen = edit.call(ops.window_tokens, order, others, window, about=about)
        columns, order = edit.item(chosen, 0, about), edit.item(chosen, 1, about)
    q = _queries(edit, keys, axes, place, columns)
    near = _neighbors(edit.graph, keys.layer) if visual else None
    if near is None:
        return edit.call(ops.attention_sums, q, keys.k, order, keys.order, keys.scale, about=about)
    where = coords = coords_at(edit, keys.order[place])
    if columns is not None:
        where = edit.call(ops.take_tokens, coords, columns, 1, about=about)
    rule = (near.radius, near.metric, near.causal, "t" in near.keys)
    return edit.call(ops.neighbor_sums, q, keys.k, order, keys.order, where, coords, *rule, keys.scale, about=about)


def _neighbors(graph: fx.Graph, layer: int) -> Neighbors | None:
    """How visual tokens of a layer look at their neighbours, if they do.

    Of the last layer that sees them only keys are left in the graph: its queries look as those of the layer before.
    """
    near = [n for n in attentions(graph, stream="visual") if info(n).layer <= layer]
    found = taken_apart(near[-1]) if near else None
    return found if isinstance(found, Neighbors) else None


def _queries(edit: Rewriter, keys: LayerKeys, axes: Axes, place: int, columns: fx.Node | None) -> fx.Node:
    """The queries [B, H, n, e] of one stream of a layer, or those in `columns` int64 [B, R]."""
    stream = "visual" if keys.streams[place] == "v" else "text"
    (text,) = attentions(edit.graph, keys.layer, "text")
    asked = [q for node in attentions(edit.graph, keys.layer, stream) for q in taken_apart(node).queries]
    whole = [q for q in asked if _length(q, 2) == _length(keys.k[place], 2)]
    if whole:
        about = info(whole[0]).with_(by=edit.by, twin="")
        return whole[0] if columns is None else edit.call(ops.take_tokens, whole[0], columns, 2, about=about)
    return _Remade(edit, keys, axes, place, columns).of(Attention.of(text).q[0])


class _Remade:
    """The queries of a stream that the graph leaves out because nobody asks: the text's, on what that stream has.

    before                                        after
    q.text = rope(linear(h.text[:, -1:], wq))     q.visual = rope(linear(h.visual, wq))      or that of all of h.text
    """

    def __init__(self, edit: Rewriter, keys: LayerKeys, axes: Axes, place: int, columns: fx.Node | None) -> None:
        self.edit, self.keys, self.axes, self.columns = edit, keys, axes, columns
        self.visual = keys.streams[place] == "v"
        self.key = keys.k[place]
        self.made: dict[fx.Node, fx.Node] = {}
        nodes = [n for n in edit.graph.nodes if n in axes and info(n).twin and info(n).layer <= keys.layer]
        self.twins = {info(n).twin: n for n in nodes if info(n).stream == "visual"} if self.visual else {}

    def of(self, node: fx.Node) -> fx.Node:
        """What stands for one of the values that the last text token's query is made from."""
        if node not in self.made:
            self.made[node] = self._of(node)
        return self.made[node]

    def _of(self, node: fx.Node) -> fx.Node:
        if takes_last(node, self.axes):
            source: fx.Node = args_of(node)[0]
            return self.of(source) if self.visual else self._chosen(source)
        if info(node).stream == "text" and info(node).twin in self.twins:
            return self._chosen(self._left(self.twins[info(node).twin]))
        if node.op != "call_function" or all(self.of(n) is n for n in node.all_input_nodes):
            return node
        about = info(node).with_(stream="visual" if self.visual else "text", by=self.edit.by, origin=(node.name,))
        if self.columns is not None:
            about = about.with_(twin="")  # a few tokens of each stream are not worth a join
        args, kwargs = map_arg((node.args, node.kwargs), self.of)
        return self.edit.call(node.target, *args, about=about, **kwargs)

    def _left(self, node: fx.Node) -> fx.Node:
        """What selections before the layer left of a visual value."""
        for user in node.users:
            cut = user.target in (ops.take_tokens, ops.merge_tokens) and args_of(user)[0] is node
            if cut and user in self.axes and info(user).layer <= self.keys.layer:
                return self._left(user)
        return node

    def _chosen(self, node: fx.Node) -> fx.Node:
        axis = self.axes[node]
        assert axis is not None  # a value of a stream has tokens
        about = info(node).with_(layer=self.keys.layer, by=self.edit.by, origin=(node.name,), twin="")
        if _length(node, axis) != _length(self.key, 2):
            # The layer's own keys chose who stays; what is read here stands before that.
            node = self.edit.call(ops.take_tokens, node, args_of(self.key)[1], axis, about=about)
        if self.columns is not None:
            node = self.edit.call(ops.take_tokens, node, self.columns, axis, about=about)
        return node


def _length(node: fx.Node, axis: int) -> Any:
    """A size as an expression, which can be compared without a guard."""
    size = shape(node)[axis]
    return size.node.expr if isinstance(size, torch.SymInt) else size
