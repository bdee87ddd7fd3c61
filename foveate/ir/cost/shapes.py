"""What is left of each decoder layer for visual tokens: how many tokens, heads and neurons."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate import ops
from foveate.ir.attention import attentions, taken_apart
from foveate.ir.cost.sizes import Sizes
from foveate.ir.program import Program, args_of, layer_kv
from foveate.ir.rewriter import nodes_of

aten = torch.ops.aten


@dataclass(frozen=True)
class LayerShape:
    """Widths of one layer for visual tokens; `tokens` 0 where the visual stream does not reach it."""

    tokens: int
    heads: int
    kv_heads: int
    neurons: int


def layer_shapes(program: Program, sizes: Sizes) -> list[LayerShape]:
    """A shape for each decoder layer, as published counts see it.

    What nobody reads is not in the graph: of the last layer with visual tokens only keys and values are left. Papers
    count that layer whole, so its missing parts get the widths last seen in a layer before (the model's, in layer 0).
    """
    about, graph = program.info, program.prefill
    heads, neurons = about.heads, about.intermediate_size
    shapes = []
    for layer, kv in enumerate(layer_kv(graph)):
        queries = [sizes.shape(taken_apart(n).queries[0]) for n in attentions(graph, layer, "visual")]
        ffn = _feed_forward(program, sizes, layer)
        keys = sizes.shape(kv.visual[0]) if kv.visual else None
        if not ffn and not keys:
            shapes.append(LayerShape(0, 0, 0, 0))
            continue
        heads = sum(q[1] for q in queries) or heads
        tokens, neurons = ffn[0] if ffn else (keys[2] if keys else 0, neurons)
        # An FFN without keys before it: every head of the layer was dropped.
        shapes.append(LayerShape(tokens, heads, keys[1], neurons) if keys else LayerShape(tokens, 0, 0, neurons))
    return shapes


def _feed_forward(program: Program, sizes: Sizes, layer: int) -> list[tuple[int, int]]:
    """Visual tokens that go through the layer's feed-forward part, and neurons that each uses of it."""
    role = program.info.roles["down"]
    linears = nodes_of(program.prefill, stream="visual", role=role, layer=layer, op=aten.linear.default)
    inputs = [sizes.shape(args_of(n)[0]) for n in linears]
    found = [(size[1], size[-1]) for size in inputs]
    for node in nodes_of(program.prefill, stream="visual", layer=layer, op=ops.experts):
        x, _, _, down, chosen, _ = args_of(node)
        found.append((sizes.shape(x)[1], int(chosen) * sizes.shape(down)[2]))
    return found
