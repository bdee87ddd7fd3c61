"""Join at the end: where both streams do the same op with the same weight, do it once.

    split                                        joined
    q.visual = linear(h.visual, w)               h = cat(h.visual, h.text)
    q.text   = linear(h.text, w)                 q = linear(h, w)      w is read once
    a.visual = attention(q.visual; both)         a = attention(q.visual, q.text; both)   one causal call
    a.text   = attention(q.text; both)

Two nodes are joined when they stem from the same joint value (`NodeInfo.twin`), call the same op with the same
constants and shared values, and their other arguments can be concatenated along the token axis. The joined value
*is* the concatenation of the two, so this is sound wherever no token mixes with another. A stream that is needed
alone is a slice of the joined value. Where visual tokens use a part of a weight, `foveate.ir.share` has made text
do that part apart, so that it is joined as well.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from foveate import ops
from foveate.ir.attention import Attention
from foveate.ir.program import NodeInfo, Program, args_of, info, outputs
from foveate.ir.residual import fold_residuals
from foveate.ir.rewriter import Rewriter, equal_nodes, map_arg
from foveate.ir.select import token_inputs
from foveate.ir.share import share_parts
from foveate.ir.sums import fold_sums
from foveate.ir.tail import END
from foveate.ir.tokens import Axes, takes_last, token_axes

aten = torch.ops.aten


@dataclass(frozen=True)
class Pair:
    """The visual and the text version of one value."""

    visual: fx.Node
    text: fx.Node


def join(program: Program, graph: fx.Graph, inputs: bool = False, share: bool = True) -> fx.Graph:
    """The joined form of a split prefill graph, which is not changed.

    With `inputs`, the graph's own inputs are joined too, and the result takes `hidden`, `position_ids` and `order`
    again: `join(split(g), inputs=True)` gives back g. share: parts of weights are joined too, see `foveate.ir.share`;
    that pays where matmuls wait for memory, and costs more ops where they do not.
    """
    return _Joiner(program, share_parts(program, graph) if share and not inputs else graph, inputs).run()


class _Joiner:
    def __init__(self, program: Program, graph: fx.Graph, inputs: bool) -> None:
        self.graph = graph
        self.whole = inputs
        self.edit = Rewriter(program, fx.Graph(), by="join")
        self.axes: Axes = token_axes(graph, token_inputs(graph))
        self.same = equal_nodes(graph)
        self.pairs = self._find_pairs()
        self.alone: dict[fx.Node, fx.Node] = {}
        self.joined: dict[Pair, fx.Node] = {}
        self.orders = [n for n in graph.nodes if n.op == "placeholder" and n.name == "visual_order"]
        self.orders += outputs(graph).get("kept", {}).values()
        self.counts: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.Graph:
        self._inputs()
        result = outputs(self.graph)
        for node in self.graph.nodes:
            if node.op == "call_function" and self.same[node] is node:
                self._emit(node)
        if self.whole:
            kv = [
                [None, None, *(self._together(v, t) for v, t in zip(e[:2], e[2:], strict=True))] for e in result["kv"]
            ]
            self.edit.output({"out": self._one(result["logits"]), "kv": kv})
        else:
            self.edit.output(map_arg(result, self._one))
        fold_residuals(self.edit)
        fold_sums(self.edit)
        self.edit.sweep()
        return self.edit.graph

    # Which nodes go together.

    def _find_pairs(self) -> dict[fx.Node, Pair]:
        """Node -> its pair, for every node that has one."""
        waiting: dict[tuple[str, Any], list[fx.Node]] = {}
        pairs: dict[fx.Node, Pair] = {}
        # What each node needs, as bits: a selection may make a visual value wait for its own twin.
        bit = {node: 1 << place for place, node in enumerate(self.graph.nodes)}
        needs: dict[fx.Node, int] = {}
        for node in self.graph.nodes:
            needs[node] = bit[node]
            for source in node.all_input_nodes:
                needs[node] |= needs[source]
            about = info(node)
            if not about.twin or about.stream not in ("visual", "text") or self.same[node] is not node:
                continue
            key = (about.twin, node.target if node.op == "call_function" else node.op)
            for other in waiting.get(key, []):
                if info(other).stream != about.stream and other not in pairs:
                    pair = Pair(other, node) if about.stream == "text" else Pair(node, other)
                    if not (needs[node] & bit[other] or needs[other] & bit[node]) and self._fits(pair):
                        pairs[node] = pairs[other] = pair
                        break
            waiting.setdefault(key, []).append(node)
        return pairs

    def _fits(self, pair: Pair) -> bool:
        visual, text = pair.visual, pair.text
        if visual.op == "placeholder":
            return self._alike(visual, text)
        if visual.target == ops.attention:
            a, b = Attention.of(visual), Attention.of(text)
            shared = [map_arg((x.k, x.v, x.k_order, x.prefix, x.scale), self.same.__getitem__) for x in (a, b)]
            sees = [(x.reach is None, x.window) for x in (a, b)]
            return shared[0] == shared[1] and sees[0] == sees[1] and self._alike(a.q[0], b.q[0])
        if len(visual.args) != len(text.args) or visual.kwargs != text.kwargs or self.axes.get(visual) is None:
            return False
        return self.axes.get(visual) == self.axes.get(text) and all(
            self._args_fit(a, b) for a, b in zip(visual.args, text.args, strict=True)
        )

    def _args_fit(self, a: Any, b: Any) -> bool:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            return self.same[a] is self.same[b] or self._alike(a, b)
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            return len(a) == len(b) and all(map(self._args_fit, a, b))
        return not isinstance(a, fx.Node) and not isinstance(b, fx.Node) and a == b

    def _alike(self, visual: fx.Node, text: fx.Node) -> bool:
        """Whether two values can be concatenated along their token axis."""
        axis = self.axes.get(visual)
        if axis is None or axis != self.axes.get(text) or info(visual).stream != "visual":
            return False
        a, b = visual.meta["val"], text.meta["val"]
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.dim() != b.dim() or a.dtype != b.dtype:
            return False
        return all(_same_size(x, y) for i, (x, y) in enumerate(zip(a.shape, b.shape, strict=True)) if i != axis)

    # Writing the new graph.

    def _inputs(self) -> None:
        done: set[str] = set()
        for node in self.graph.nodes:
            if node.op != "placeholder":
                continue
            about = info(node)
            if not self.whole:
                self.alone[node] = self.edit.placeholder(str(node.target), node.meta["val"], about)
            elif about.twin and about.twin not in done:
                done.add(about.twin)
                value: Tensor = node.meta["val"]
                sizes: list[Any] = list(value.shape)
                sizes[self.axes[node] or 0] = "sequence"
                fake = self.edit.program.symbols.tensor(*sizes, dtype=value.dtype, device=value.device)
                pair = self.pairs[node]
                self.joined[pair] = self.edit.placeholder(about.twin, fake, about.with_(stream="joint"))

    def _emit(self, node: fx.Node) -> None:
        """Write a node, or its pair, after everything it needs; pairs may stand in another order than their parts."""
        stack = [node]
        while stack:
            top = stack[-1]
            if self._done(top):
                stack.pop()
                continue
            pair = self.pairs.get(top)
            needed = {self.same[n] for m in ((pair.visual, pair.text) if pair else (top,)) for n in m.all_input_nodes}
            missing = [n for n in needed if n.op == "call_function" and not self._done(n)]
            if missing:
                stack += sorted(missing, key=lambda n: n.name)
                continue
            stack.pop()
            if pair:
                self.joined[pair] = self._write_pair(pair)
            else:
                self.alone[top] = self._write_one(top)

    def _done(self, node: fx.Node) -> bool:
        pair = self.pairs.get(node)
        return node in self.alone or (pair is not None and pair in self.joined)

    def _write_one(self, node: fx.Node) -> fx.Node:
        about = info(node)
        if node.target is operator.getitem:
            source, place = args_of(node)
            return self.edit.item(self._one(source), place, about)
        if takes_last(node, self.axes) or node.target == aten.sym_size.int:
            source, *rest = args_of(node)
            pair = self.pairs.get(source)
            if pair and pair in self.joined:
                # Text stands last in a joined value, so its last token is the joined value's; so is the batch size.
                return self.edit.call(node.target, self.joined[pair], *rest, about=about)
        args, kwargs = map_arg((node.args, node.kwargs), self._one)
        return self.edit.call(node.target, *args, about=about, **kwargs)

    def _write_pair(self, pair: Pair) -> fx.Node:
        visual, text = pair.visual, pair.text
        about = info(text).with_(stream="joint", origin=(visual.name, text.name))
        if visual.target == ops.attention:
            return self._write_attention(pair, about)
        args = tuple(self._both(a, b) for a, b in zip(visual.args, text.args, strict=True))
        return self.edit.call(visual.target, *args, about=about, **map_arg(text.kwargs, self._one))

    def _write_attention(self, pair: Pair, about: NodeInfo) -> fx.Node:
        visual, text = Attention.of(pair.visual), Attention.of(pair.text)
        if self.whole:
            q, k, v, order = ([self._together(*x)] for x in ((visual.q[0], text.q[0]), text.k, text.v, text.k_order))
            reach = [self._together(*x) for x in zip(visual.reach or (), text.reach or (), strict=True)] or None
            joint = Attention(q, k, v, order, order, -1, "s:s", text.scale, reach, text.window)
            return self.edit.call(ops.attention, *joint.args, about=about)
        q, q_order = ([self._one(x[0]) for x in xs] for xs in ((visual.q, text.q), (visual.q_order, text.q_order)))
        k, v, k_order, prefix = map_arg((text.k, text.v, text.k_order, text.prefix), self._one)
        reach = [self._one(x) for x in (*(visual.reach or ()), *(text.reach or ()))] or None
        both = Attention(q, k, v, q_order, k_order, prefix, f"vt:{text.keys}", text.scale, reach, text.window)
        return self.edit.call(ops.attention, *both.args, about=about)

    def _both(self, a: Any, b: Any) -> Any:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            return self._one(b) if self.same[a] is self.same[b] else self._together(a, b)
        if isinstance(a, (list, tuple)):
            return [self._both(x, y) for x, y in zip(a, b, strict=True)]
        return b

    def _together(self, visual: fx.Node, text: fx.Node) -> fx.Node:
        """The concatenation of two values: a joined value, or a `cat`."""
        pair = self.pairs.get(self.same[visual], None)
        if pair is None or pair.text is not self.same[text]:
            pair = Pair(self.same[visual], self.same[text])
        if pair not in self.joined:
            about = info(text).with_(stream="joint", by="join", origin=(visual.name, text.name))
            parts = [self._one(visual), self._one(text)]
            self.joined[pair] = self.edit.call(aten.cat.default, parts, self.axes[visual], about=about)
        return self.joined[pair]

    def _one(self, node: fx.Node) -> fx.Node:
        """The new graph's version of a node: itself, or its part of a joined value."""
        node = self.same[node]
        if node.op == "get_attr":
            return self.edit.weight(str(node.target))
        if node not in self.alone:
            pair = self.pairs[node]
            assert not self.whole, f"{node.name} is needed alone"
            joined, axis = self.joined[pair], self.axes[node]
            count = self._count(pair.visual)
            bounds = (0, count) if node is pair.visual else (count, END)
            about = info(node).with_(by="join", origin=(joined.name,))
            self.alone[node] = self.edit.call(aten.slice.Tensor, joined, axis, *bounds, about=about)
        return self.alone[node]

    def _count(self, visual: fx.Node) -> fx.Node:
        """How many visual tokens a value has, as a node; the order tensor of the same length knows."""
        size = visual.meta["val"].shape[self.axes[visual]]
        order = next(n for n in self.orders if _same_size(n.meta["val"].shape[1], size))
        if order not in self.counts:
            about = NodeInfo(-1, "visual_tokens", "none", "join")
            self.counts[order] = self.edit.call(aten.sym_size.int, self._one(order), 1, about=about)
        return self.counts[order]


def _same_size(a: Any, b: Any) -> bool:
    """Whether two symbolic sizes are the same expression (no guard is made)."""
    plain = [s.node.expr if isinstance(s, torch.SymInt) else s for s in (a, b)]
    return bool(plain[0] == plain[1])
