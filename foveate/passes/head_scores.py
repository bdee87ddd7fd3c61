"""How much each attention head can say, from the weights alone."""

from __future__ import annotations

import torch

from foveate.ir.program import Program
from foveate.ir.rewriter import nodes_of
from foveate.ir.weights import read_weight


def weight_norm_scores(program: Program) -> list[list[float]]:
    """[layers][heads]: Frobenius norm of each head's output projection times its value projection.

    ||W_o W_v||^2 = sum((W_o^T W_o) * (W_v W_v^T)), two products as small as the head. On `meta` each
    key head's first query head comes first, then each one's second, and so on.
    """
    model = program.info
    rows: list[list[float]] = []
    for layer in range(model.layers):
        weights = {
            part: read_weight(
                program,
                nodes_of(
                    program.prefill,
                    stream="text",
                    role=model.roles[part],
                    layer=layer,
                    op=torch.ops.aten.linear.default,
                )[0],
            )
            for part in "vo"
        }
        if weights["v"].is_meta:
            # Without weights the heads are spread over the key heads, as real choices tend to be.
            rows.append([-float(h % (model.heads // model.kv_heads)) for h in range(model.heads)])
            continue
        value = weights["v"].float().unflatten(0, (model.kv_heads, model.head_dim))
        value = value.repeat_interleave(model.heads // model.kv_heads, dim=0)
        out = weights["o"].float().unflatten(1, (model.heads, model.head_dim)).transpose(0, 1)
        products = (out.transpose(1, 2) @ out) * (value @ value.transpose(1, 2))
        rows.append(products.sum((1, 2)).clamp(min=0).sqrt().tolist())
    return rows
