"""The training graph, derived from the prefill graph as the passes left it; nothing is traced again.

    prefill                                             train
    h1 = slice(h, 1, -1, END)        by keep-last       h1 = take_tokens(h, asked, 1)
    logits [B, 1, V]                 the last token     logits [B, asked, V]       the tokens that a label follows
    q1 = slice(q, 2, -1, END)        by a selection     q1 = take_tokens(q, asking, 2)

In a training sequence the prompt is followed by its answer. So the last layer, the final norm and the head run for the
tokens that have a label to predict (`asked`), and what the last text token decides when a prompt stands alone is
decided by one token that is named (`asking`, the last of the prompt): later tokens are hidden from it by their order,
so it decides as it would without them. All else is the prefill graph, node by node.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from foveate import ops
from foveate.ir.attention import Attention, attentions
from foveate.ir.program import NodeInfo, Program, args_of, copy_graph, info, outputs
from foveate.ir.rewriter import Rewriter
from foveate.ir.select import token_inputs
from foveate.ir.tokens import takes_last, token_axes


def derive_train(program: Program) -> fx.Graph:
    """The graph from both streams to the logits of chosen text tokens, and the visual tokens that were kept.

    Inputs: those of the prefill graph; `asked` int64 [B, k], columns of the text stream whose next token is wanted;
    `asking` int64 [B, 1], the column that selections heed, where the program has any. Returns `{"logits": [B, k, V],
    "kept": ...}`, what else the prefill graph returns, and no keys or values.
    """
    edit = Rewriter(program, copy_graph(program.prefill), by="train")
    graph = edit.graph
    axes = token_axes(graph, token_inputs(graph))
    columns: dict[str, fx.Node] = {}

    def column(name: str, count: str | int) -> fx.Node:
        if name not in columns:
            device = next(n for n in graph.nodes if n.name == "text").meta["val"].device
            value = program.symbols.tensor("batch", count, dtype=torch.int64, device=device)
            columns[name] = edit.placeholder(name, value, NodeInfo(-1, name, "text"))
        return columns[name]

    for node in [n for n in graph.nodes if takes_last(n, axes)]:
        source, axis, *_ = args_of(node)
        chosen = column("asked", "asked") if info(node).by == "keep-last" else column("asking", 1)
        with edit.before(node):
            edit.replace(node, edit.call(ops.take_tokens, source, chosen, axis, about=info(node)))
    for node in attentions(graph, stream="text"):
        scattered = Attention.of(node)
        if any(_reads(order, columns["asked"]) for order in scattered.q_order):
            # The queries are no longer the last of the prompt in a row, which `prefix` would promise.
            node.args = replace(scattered, prefix=-1).args
    result: dict[str, Any] = outputs(graph)
    edit.output({name: value for name, value in result.items() if name not in ("kv", "held")})
    edit.sweep()
    edit.refresh()
    return graph


def _reads(order: fx.Node, columns: fx.Node) -> bool:
    return order.target == ops.take_tokens and args_of(order)[1] is columns
