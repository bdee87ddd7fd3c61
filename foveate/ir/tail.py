"""Only the last text token is asked for a prediction, so the tail of the network runs for it alone.

    before                                        after
    q = linear(h, wq)            all text         q = linear(h[:, -1:], wq)    one token
    h2 = h + o(attention(q..))   all text         h2 = h[:, -1:] + ...
    y = head(norm(h2)[:, -1:])                    y = head(norm(h2))

Sound because every op moved works on each token alone; keys and values of the last layer are still made for all
tokens. What is saved is one layer's query, output and FFN work for every text token but one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from foveate import ops
from foveate.ir.attention import Attention
from foveate.ir.program import Program, info
from foveate.ir.rewriter import Rewriter, map_arg, output_nodes
from foveate.ir.select import token_inputs
from foveate.ir.tokens import LAST, takes_last, token_axes

END = 9223372036854775807
"""End of an open slice, as torch writes it."""


def keep_last(program: Program, graph: fx.Graph) -> fx.Graph:
    """Edit a split prefill graph in place so that nothing is computed for tokens whose result nobody reads."""
    edit = Rewriter(program, graph, by="keep-last")
    axes = token_axes(graph, token_inputs(graph))
    needed = output_nodes(graph)
    ends = [n for n in graph.nodes if n.op == "call_function" and takes_last(n, axes)]
    last_only: set[fx.Node] = set(ends)
    for node in reversed(list(graph.nodes)):
        wanted = node.op == "call_function" and node not in needed and axes.get(node) is not None
        if wanted and node.users and all(u in last_only and _reads_query(u, node) for u in node.users):
            last_only.add(node)
    short: dict[fx.Node, fx.Node] = {}

    def shortened(node: fx.Node) -> fx.Node:
        """The last token of a value, as a slice of it or as the shortened node itself."""
        axis = axes.get(node)
        if node in short or axis is None:
            return short.get(node, node)
        with edit.after(node):
            about = info(node).with_(by="keep-last", origin=(node.name,))
            short[node] = edit.call(LAST, node, axis, -1, END, about=about)
        return short[node]

    for node in [n for n in graph.nodes if n in last_only]:
        if node in ends:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            edit.replace(node, shortened(source))
            continue
        with edit.before(node):
            short[node] = edit.like(node, _short_args(node, shortened))
    edit.sweep()
    return graph


def _reads_query(user: fx.Node, node: fx.Node) -> bool:
    """Whether `user` reads `node` token by token: true of every op but attention, of which only queries are."""
    if user.target != ops.attention:
        return True
    attention = Attention.of(user)
    asked = (*attention.q, *attention.q_order, *(attention.reach or ()))
    return node in asked and node not in (*attention.k, *attention.v, *attention.k_order)


def _short_args(node: fx.Node, shortened: Any) -> tuple[Any, ...]:
    if node.target != ops.attention:
        return tuple(map_arg(node.args, shortened))
    attention = Attention.of(node)
    q, q_order = ([shortened(x) for x in xs] for xs in (attention.q, attention.q_order))
    reach = None if attention.reach is None else [shortened(x) for x in attention.reach]
    return replace(attention, q=q, q_order=q_order, reach=reach).args
