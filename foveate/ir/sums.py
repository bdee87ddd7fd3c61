"""What a layer's queries pay to its keys, taken from the attention that looks at all of them anyway.

    a = attention([q.visual, q.text]; keys)                              a, s = attention_with_sums(
    s = attention_sums(q.visual; keys) + attention_sums(q.text; keys)           [q.visual, q.text]; keys)

`foveate.ir.kv` asks for the sums of each stream; when `foveate.ir.join` has made one attention of both, it knows them.
"""

from __future__ import annotations

import torch
from torch import fx

from foveate import ops
from foveate.ir.attention import Attention
from foveate.ir.program import args_of, info
from foveate.ir.rewriter import Rewriter, nodes_of

aten = torch.ops.aten


def fold_sums(edit: Rewriter) -> None:
    """Rewrite every such pair of a joined graph."""
    for total in nodes_of(edit.graph, op=aten.add.Tensor):
        parts = args_of(total)
        if len(parts) == 2 and all(isinstance(n, fx.Node) and n.target == ops.attention_sums for n in parts):
            _fold(edit, total, parts)


def _fold(edit: Rewriter, total: fx.Node, parts: tuple[fx.Node, fx.Node]) -> None:
    asked, keys, orders, *rest = zip(*(args_of(part) for part in parts), strict=True)
    for node in nodes_of(edit.graph, layer=info(total).layer, op=ops.attention):
        found = Attention.of(node)
        same = found.layout == "vt:vt" and (found.q, found.q_order) == (list(asked), list(orders))
        seen = [found.k, found.k_order, found.scale]
        if same and all([list(keys[i]), *(r[i] for r in rest)] == seen for i in range(2)):
            if all(node < user for user in total.users):
                _replace(edit, total, node)
            return


def _replace(edit: Rewriter, total: fx.Node, node: fx.Node) -> None:
    with edit.before(node):
        both = edit.call(ops.attention_with_sums, *args_of(node), about=info(node))
        edit.replace(node, edit.item(both, 0, info(node)))
        edit.replace(total, edit.item(both, 1, info(total)))
