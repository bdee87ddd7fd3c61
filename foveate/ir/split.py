"""The modality-split form. `foveate.ir.join` is the way back.

    before (joint)                         after (split)
    h [B, S, D]                            h.visual [B, Nv, D]           h.text [B, Nt, D]
    q = linear(h, w)                       q.visual = linear(h.visual, w)   q.text = linear(h.text, w)
    a = attention(q, k, v)                 a.visual = attention(q.visual; k.visual + k.text)
                                           a.text   = attention(q.text;   k.visual + k.text)

Sound because token-axis analysis proves that every op but attention works on each token alone, and attention is
given the keys of both streams with their order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import fx

from foveate import ops
from foveate.ir.attention import Attention
from foveate.ir.program import NodeInfo, Program, info
from foveate.ir.rewriter import Rewriter, map_arg
from foveate.ir.select import token_inputs
from foveate.ir.tokens import takes_last, token_axes

_STREAMS: tuple[Literal["visual", "text"], ...] = ("visual", "text")


def split(program: Program, joint: fx.Graph) -> fx.Graph:
    """The split form of a joint decoder graph; the joint graph is not changed.

    What the joint graph computes and no one will read (the last layer's visual output) is still there: `keep_last`
    sweeps it out. The result takes `visual`, `text`, `visual_position_ids`, `text_position_ids`, `visual_order`,
    `text_order` and the integer `prefix` (see `foveate.ops.attention`), and where the joint graph takes `reach`
    `visual_reach` and `text_reach`, and returns `{"logits": [B, 1, V], "kv":
    [[k_visual, v_visual, k_text, v_text] a layer], "kept": {}}`.
    """
    axes = token_axes(joint, token_inputs(joint))
    graph = fx.Graph()
    edit = Rewriter(program, graph, by="split")
    twins: dict[fx.Node, dict[str, fx.Node]] = {}
    prefix: fx.Node | None = None

    def part(stream: str) -> Callable[[fx.Node], fx.Node]:
        """The given stream's version of a joint value, or its only one."""
        return lambda node: twins[node].get(stream) or twins[node]["text"]

    for node in joint.nodes:
        about = info(node).with_(twin=node.name, by="split")
        if node.op == "placeholder":
            twins[node] = {s: _input(edit, node, s, axes[node]) for s in _STREAMS}
        elif node.op == "get_attr":
            twins[node] = {"text": edit.weight(str(node.target))}
        elif node.op == "output":
            edit.output(_outputs(node, twins))
        elif node.target == ops.attention:
            if prefix is None:
                prefix = edit.placeholder("prefix", program.symbols["prefix"], NodeInfo(-1, "prefix"))
            twins[node] = {s: _attention(edit, node, twins, s, prefix) for s in _STREAMS}
        elif axes[node] is None:
            # The last token is a text token, and so is all that is made from it; the rest has no tokens.
            last = takes_last(node, axes) or any(
                axes[n] is None and info(twins[n]["text"]).stream == "text" for n in node.all_input_nodes
            )
            about = about.with_(stream="text" if last else "none")
            args, kwargs = map_arg((node.args, node.kwargs), part("text"))
            twins[node] = {"text": edit.call(node.target, *args, about=about, **kwargs)}
        else:
            twins[node] = {}
            for stream in _STREAMS:
                args, kwargs = map_arg((node.args, node.kwargs), part(stream))
                twins[node][stream] = edit.call(node.target, *args, about=about.with_(stream=stream), **kwargs)
    return graph


def _input(edit: Rewriter, node: fx.Node, stream: str, axis: int | None) -> fx.Node:
    value = node.meta["val"]
    assert axis is not None  # every input of a joint decoder has tokens
    sizes: list[Any] = list(value.shape)
    sizes[axis] = edit.program.symbols[f"{stream}_tokens"]
    with edit.program.symbols.mode:
        fake = torch.empty(sizes, dtype=value.dtype, device=value.device)
    name = stream if node.name == "hidden" else f"{stream}_{node.name}"
    about = NodeInfo(-1, node.name, "visual" if stream == "visual" else "text", twin=node.name)
    return edit.placeholder(name, fake, about)


def _attention(
    edit: Rewriter, node: fx.Node, twins: dict[fx.Node, dict[str, fx.Node]], stream: Any, prefix: fx.Node
) -> fx.Node:
    joint = Attention.of(node)
    keys, values, key_order = ([twins[x][s] for s in _STREAMS] for x in (joint.k[0], joint.v[0], joint.k_order[0]))
    q, q_order = [twins[joint.q[0]][stream]], [twins[joint.q_order[0]][stream]]
    reach = None if joint.reach is None else [twins[x][stream] for x in joint.reach]
    layout, window = f"{stream[0]}:vt", joint.window
    apart = Attention(q, keys, values, q_order, key_order, prefix, layout, joint.scale, reach, window)
    about = info(node).with_(stream=stream, twin=node.name, by="split")
    return edit.call(ops.attention, *apart.args, about=about)


def _outputs(node: fx.Node, twins: dict[fx.Node, dict[str, fx.Node]]) -> dict[str, Any]:
    value: Any = node.args[0]
    kv = [[twins[x][s] for s in _STREAMS for x in (k, v)] for _, _, k, v in value["kv"]]
    return {"logits": twins[value["out"]]["text"], "kv": kv, "kept": {}}


def structure(graph: fx.Graph) -> list[tuple[Any, ...]]:
    """A graph as plain data, up to node names: what round trips compare."""
    computing = [n for n in graph.nodes if n.op != "get_attr"]
    number = {node: i for i, node in enumerate(computing)}

    def plain(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("weight", value.target) if value.op == "get_attr" else ("node", number[value])
        if isinstance(value, (list, tuple)):
            return tuple(plain(v) for v in value)
        if isinstance(value, dict):
            return tuple((k, plain(v)) for k, v in value.items())
        return value

    return [(n.op, str(n.target), plain(n.args), plain(n.kwargs), info(n).layer, info(n).role) for n in computing]
