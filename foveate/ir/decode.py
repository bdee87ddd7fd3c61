"""The decode graph, derived from the prefill graph as the passes left it; nothing is traced again.

    prefill (text stream)                         decode
    k.text = rope(linear(h.text, wk))             k.new = the same, for the new tokens
    a = attention(q.text; k.visual + k.text)      a = attention(q.new; cached k.visual + cached k.text + k.new)

Sound because every op of the text stream but attention works on each token alone, so the ops between a cached key
and its attention (a slice of heads, say) apply to the cached tokens exactly as they do to new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from foveate import ops
from foveate.ir.attention import Attention
from foveate.ir.program import NodeInfo, Program, info, layer_kv, outputs
from foveate.ir.rewriter import Rewriter, map_arg


def derive_decode(program: Program) -> fx.Graph:
    """The graph from new text tokens and the cache to the next token's logits and the new tokens' keys and values.

    Inputs: `text` [B, T, D], `text_position_ids`, `text_order`, `past_order` [B, P], `prefix`; for each layer
    `past_k_<l>`, `past_v_<l>` [B, Hk, P, e] and, where the layer sees the image, `visual_k_<l>`, `visual_v_<l>`;
    `visual_order` and, after a selection before layer l, `kept_<l>`: the orders of the visual tokens still there.
    """
    return _Decode(program).run()


class _Decode:
    def __init__(self, program: Program) -> None:
        self.source = program.prefill
        self.kv = layer_kv(self.source)
        self.edit = Rewriter(program, fx.Graph(), by="decode")
        self.orders = _visual_orders(self.source)
        # One memory a role: the same prefill node can be needed for new, for cached text and for cached visual tokens.
        self.new: dict[fx.Node, fx.Node] = {}
        self.past: dict[fx.Node, fx.Node] = {}
        self.visual: dict[fx.Node, fx.Node] = {}

    def run(self) -> fx.Graph:
        self._inputs()
        wanted = [outputs(self.source)["logits"], *(n for layer in self.kv for n in layer.text)]
        for node in _reachable(wanted):
            if node not in self.new:
                self.new[node] = self._attention(node) if node.target == ops.attention else self._text(node)
        kv = [[None, None, *(self.new[n] for n in layer.text)] for layer in self.kv]
        self.edit.output({"logits": self.new[wanted[0]], "kv": kv})
        self.edit.sweep()
        for node in self.edit.graph.nodes:
            # An input that nothing reads would only make the caller keep what it stands for.
            if node.op == "placeholder" and not node.users and node.name.startswith(("visual", "kept")):
                self.edit.graph.erase_node(node)
        return self.edit.graph

    def _inputs(self) -> None:
        edit = self.edit
        symbols = edit.program.symbols
        named = {n.name: n for n in self.source.nodes if n.op == "placeholder"}
        for name in ("text", "text_position_ids", "text_order"):
            self.new[named[name]] = edit.placeholder(name, named[name].meta["val"], info(named[name]))
        device = named["text"].meta["val"].device
        past = symbols.tensor("batch", "past_tokens", dtype=torch.int64, device=device)
        self.past_order = edit.placeholder("past_order", past, NodeInfo(-1, "order", "text"))
        self.text_order = self.new[named["text_order"]]
        if "prefix" in named:
            self.new[named["prefix"]] = edit.placeholder("prefix", named["prefix"].meta["val"], info(named["prefix"]))
        for name, node in self.orders.items():
            self.visual[node] = edit.placeholder(name, node.meta["val"], NodeInfo(-1, "order", "visual"))
        for number, layer in enumerate(self.kv):
            for letter, node in zip("kv", layer.text, strict=True):
                value = node.meta["val"]
                fake = symbols.tensor(
                    "batch", value.shape[1], "past_tokens", value.shape[3], dtype=value.dtype, device=value.device
                )
                self.past[node] = edit.placeholder(f"past_{letter}_{number}", fake, NodeInfo(number, "kv", "text"))
            for letter, node in zip("kv", layer.visual or (), strict=False):
                about = NodeInfo(number, "kv", "visual")
                self.visual[node] = edit.placeholder(f"visual_{letter}_{number}", node.meta["val"], about)

    def _text(self, node: fx.Node) -> fx.Node:
        return self._copy(node, self.new, self.new.__getitem__)

    def _copy(self, node: fx.Node, memory: dict[fx.Node, fx.Node], get: Callable[[fx.Node], fx.Node]) -> fx.Node:
        if node.op == "get_attr":
            return self.edit.weight(str(node.target))
        memory[node] = self.edit.call(
            node.target, *map_arg(node.args, get), about=info(node).with_(by="decode"), **map_arg(node.kwargs, get)
        )
        return memory[node]

    def _cached(self, node: fx.Node, memory: dict[fx.Node, fx.Node]) -> fx.Node:
        """A key or value of cached tokens: the cache itself, or what the prefill does to it on the way."""
        if node in memory:
            return memory[node]
        return self._copy(node, memory, lambda n: self._cached(n, memory))

    def _attention(self, node: fx.Node) -> fx.Node:
        old = Attention.of(node)
        new: dict[str, Any] = {"k": [], "v": [], "k_order": []}
        streams = ""
        for stream, key, value, order in zip(old.keys, old.k, old.v, old.k_order, strict=True):
            memory = self.visual if stream == "v" else self.past
            new["k"].append(self._cached(key, memory))
            new["v"].append(self._cached(value, memory))
            new["k_order"].append(self.visual[order] if stream == "v" else self.past_order)
            if stream == "t":
                new["k"].append(self.new[key])
                new["v"].append(self.new[value])
                new["k_order"].append(self.text_order)
            streams += stream if stream == "v" else "tt"
        q, q_order, prefix = map_arg((old.q, old.q_order, old.prefix), lambda n: self.new[n])
        step = replace(old, **new, q=q, q_order=q_order, prefix=prefix, layout=f"t:{streams}")
        return self.edit.call(ops.attention, *step.args, about=info(node).with_(by="decode"))


def _visual_orders(graph: fx.Graph) -> dict[str, fx.Node]:
    """Input name -> each order tensor of visual keys that the prefill uses."""
    orders = {f"kept_{layer}": node for layer, node in outputs(graph)["kept"].items()}
    orders |= {n.name: n for n in graph.nodes if n.op == "placeholder" and n.name == "visual_order"}
    return orders


def _reachable(wanted: list[fx.Node]) -> list[fx.Node]:
    """What the text stream needs, inputs first; attention's visual keys are left to the cache."""
    found: dict[fx.Node, None] = {}
    stack = [(node, False) for node in reversed(wanted)]
    while stack:
        node, ready = stack.pop()
        if ready:
            found[node] = None
        elif node not in found and node.op != "placeholder":
            stack.append((node, True))
            stack.extend((n, False) for n in reversed(_text_inputs(node)) if n not in found)
    return list(found)


def _text_inputs(node: fx.Node) -> list[fx.Node]:
    if node.target != ops.attention:
        return node.all_input_nodes
    attention = Attention.of(node)
    text = [
        x
        for values in (attention.k, attention.v)
        for stream, x in zip(attention.keys, values, strict=True)
        if stream == "t"
    ]
    return [*attention.q, *attention.q_order, *text]
