"""The decode graph, derived from the prefill graph as the passes left it; nothing is traced again.

    prefill (text stream)                         decode
    k.text = rope(linear(h.text, wk))             k.new = the same, for the new tokens
    a = attention(q.text; k.visual + k.text)      a = attention(q.new; cached k.visual + cached k.text + k.new)

Sound because every op of the text stream but attention works on each token alone, so the ops between a cached key
and its attention (a slice of heads, say) apply to the cached tokens exactly as they do to new ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from foveate import ops
from foveate.ir.attention import Attention
from foveate.ir.kv import evicts_in_steps, held_names
from foveate.ir.program import NodeInfo, Program, args_of, info, layer_kv, outputs
from foveate.ir.rewriter import Rewriter, map_arg

aten = torch.ops.aten


def derive_decode(program: Program) -> fx.Graph:
    """The graph from new text tokens and the cache to the next token's logits and the new tokens' keys and values.

    Inputs: `text` [B, T, D], `text_position_ids`, `text_order`, `past_order` [B, P], `prefix`; for each layer
    `past_k_<l>`, `past_v_<l>` [B, Hk, P, e] and, where the layer sees the image, `visual_k_<l>`, `visual_v_<l>`;
    `visual_order` and, after a selection before layer l, `kept_<l>`: the orders of the visual tokens still there.
    Where the prefill evicts keys, `held_k_<l>`, `held_v_<l>` [B, Hk, C, e] and `held_order_<l>` [B, C] are what it left
    of both streams, and the text cache is that of the answer; or, where steps evict too, what is held by then, and the
    output `scores` has for each layer what the new token pays to each key and itself, fp32 [B, Hk, C + 1].
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
        self.held: dict[int, tuple[fx.Node, fx.Node, fx.Node]] = {}
        self.scores: dict[int, fx.Node] = {}

    def run(self) -> fx.Graph:
        self._inputs()
        wanted = [outputs(self.source)["logits"], *(n for layer in self.kv for n in layer.text)]
        for node in _reachable(wanted):
            if node not in self.new:
                self.new[node] = self._attention(node) if node.target == ops.attention else self._text(node)
        kv = [[None, None, *(self.new[n] for n in layer.text)] for layer in self.kv]
        result = {"logits": self.new[wanted[0]], "kv": kv}
        self.edit.output({**result, "scores": [*self.scores.values()]} if self.scores else result)
        self.edit.sweep()
        for node in self.edit.graph.nodes:
            # An input that nothing reads would only make the caller keep what it stands for.
            if node.op == "placeholder" and not node.users and node.name.startswith(("visual", "kept", "past")):
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
            for letter, node in zip("kv", () if evicts_in_steps(layer) else layer.text, strict=False):
                value = node.meta["val"]
                fake = symbols.tensor(
                    "batch", value.shape[1], "past_tokens", value.shape[3], dtype=value.dtype, device=value.device
                )
                self.past[node] = edit.placeholder(f"past_{letter}_{number}", fake, NodeInfo(number, "kv", "text"))
            if layer.held:
                continue
            for letter, node in zip("kv", layer.visual or (), strict=False):
                about = NodeInfo(number, "kv", "visual")
                self.visual[node] = edit.placeholder(f"visual_{letter}_{number}", node.meta["val"], about)

        for number, name in held_names(self.source).items():
            self.held[number] = self._held_inputs(number, name, device)

    def _held_inputs(self, number: int, name: str, device: torch.device) -> tuple[fx.Node, fx.Node, fx.Node]:
        """Keys, values and order of the block that the prefill left of a layer."""
        edit, symbols, about = self.edit, self.edit.program.symbols, NodeInfo(number, "kv", "joint")
        value = self.kv[number].text[0].meta["val"]
        sizes = ("batch", value.shape[1], name, value.shape[3])
        fake = symbols.tensor(*sizes, dtype=value.dtype, device=value.device)
        k, v = (edit.placeholder(f"held_{letter}_{number}", fake, about) for letter in "kv")
        order = symbols.tensor("batch", name, dtype=torch.int64, device=device)
        return k, v, edit.placeholder(f"held_order_{number}", order, about.with_(role="order"))

    def _text(self, node: fx.Node) -> fx.Node:
        if node.target == aten.add.Tensor and _of_deepstack(args_of(node)[1]):
            # New tokens are text, to which nothing is added.
            return self.new[args_of(node)[0]]
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

    def _pair(self, key: fx.Node, value: fx.Node, memory: dict[fx.Node, fx.Node]) -> tuple[fx.Node, fx.Node]:
        return self._cached(key, memory), self._cached(value, memory)

    def _attention(self, node: fx.Node) -> fx.Node:
        old, layer = Attention.of(node), info(node).layer
        parts: list[tuple[str, fx.Node, fx.Node, fx.Node]] = []
        if layer in self.held:
            # One block stands for both streams of the prompt, and maybe for the text that follows.
            parts.append(("s", *self.held[layer]))
        for stream, key, value, order in zip(old.keys, old.k, old.v, old.k_order, strict=True):
            if stream == "v" and layer not in self.held:
                parts.append(("v", *self._pair(key, value, self.visual), self.visual[order]))
            if stream == "t":
                if not evicts_in_steps(self.kv[layer]):
                    parts.append(("t", *self._pair(key, value, self.past), self.past_order))
                parts.append(("t", self.new[key], self.new[value], self.text_order))
        streams, *values = zip(*parts, strict=True)
        k, v, k_order = map(list, values)
        q, q_order, prefix = map_arg((old.q, old.q_order, old.prefix), lambda n: self.new[n])
        about = info(node).with_(by="decode")
        if evicts_in_steps(self.kv[layer]):
            paid = (q[0], k, q_order[0], k_order, old.scale)
            self.scores[layer] = self.edit.call(ops.attention_sums, *paid, about=about.with_(role="cache"))
        # What an answer is made of is text, which sees what is before it.
        step = Attention(q, k, v, q_order, k_order, prefix, f"t:{''.join(streams)}", old.scale, None, old.window)
        return self.edit.call(ops.attention, *step.args, about=about)


def _of_deepstack(value: Any) -> bool:
    """Whether a value is, or is a part of, the text stream's features of DeepStack."""
    if isinstance(value, fx.Node) and value.target in (aten.select.int, aten.slice.Tensor):
        return _of_deepstack(args_of(value)[0])
    return isinstance(value, fx.Node) and value.op == "placeholder" and value.name == "text_deepstack"


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
            stack.extend((n, False) for n in reversed(_text_inputs(node)) if n not in found and not _of_deepstack(n))
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
