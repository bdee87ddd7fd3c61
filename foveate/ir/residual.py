"""A residual sum that both streams share and text adds something to, as one op instead of a sum and a copy.

    s = add(h, a);  n = count                                    x = residual(h, a, rest)
    x = cat(s[:, :n], add(s[:, n:], rest), dim=1)

`foveate.ir.share` leaves such sums: `a` is what all tokens get from the part of a weight that they share, `rest` what
text gets from its own part.
"""

from __future__ import annotations

import torch
from torch import fx

from foveate import ops
from foveate.ir.program import args_of, info
from foveate.ir.rewriter import Rewriter
from foveate.ir.tail import END

aten = torch.ops.aten


def fold_residuals(edit: Rewriter) -> None:
    """Rewrite every such sum of a joined graph."""
    for node in list(edit.graph.nodes):
        if node.target == aten.cat.default:
            _fold(edit, node)


def _fold(edit: Rewriter, cat: fx.Node) -> None:
    parts, dim = args_of(cat)
    if dim != 1 or len(parts) != 2 or parts[0].target != aten.slice.Tensor or parts[1].target != aten.add.Tensor:
        return
    visual, text = parts
    own, rest, *alpha = args_of(text)
    if alpha or own.target != aten.slice.Tensor:
        return
    (sum_, *front), (other, *back) = args_of(visual), args_of(own)
    count = front[-1]
    if sum_ is not other or sum_.target != aten.add.Tensor:
        return
    if front != [1, 0, count] or back != [1, count, END] or len(args_of(sum_)) != 2:
        return
    if set(sum_.users) != {visual, own} or any(len(n.users) != 1 for n in (visual, own)):
        return  # somebody needs the sum itself
    with edit.before(text):
        whole = edit.call(ops.residual, *args_of(sum_), rest, about=info(cat))
        edit.replace(cat, whole)
        if len(text.users) > 1:
            edit.replace(text, edit.call(aten.slice.Tensor, whole, 1, count, END, about=info(text)))
