"""Observers: a copy of a dense program whose prefill graph also returns what calibration counts.

    before                                     after
    a.visual = attention(q.visual; both)       the same, and
    a.text   = attention(q.text; both)         mass, norms, by_distance, pairs = attention_statistics(both; both)
    y.visual = down(x.visual)                  the same, and neurons = activity(x.visual)
    logits                                     the same, and for each layer what they are if text is blind from there
                                               on: cut_kl = divergence(logits of a text-only copy of the rest, logits)
                                               if asked for: cross, own = received_attention(text; visual), (visual)

Nothing else changes, so that logits are the model's own, and no value has an entry for each pair of tokens.
"""

from __future__ import annotations

import math

import torch
from torch import fx

from foveate import ops
from foveate.errors import TraceError
from foveate.ir.attention import Attention, attentions, taken_apart
from foveate.ir.program import ModelInfo, NodeInfo, Program, args_of, info, outputs
from foveate.ir.rewriter import Rewriter, map_arg, nodes_of, shape
from foveate.ir.select import coords_at

OBSERVERS = ("mass", "norms", "by_distance", "pairs", "neurons", "cut_kl")
"""Values observed in a layer, in the order of the `statistics` output; see `foveate.ops` for their shapes.

In place of neurons stands None where a layer has others than `ModelInfo` says, as one of experts has."""


TOKENS = ("cross", "own")
"""What else is observed in a layer, of each visual token, where that is asked for."""


def distances_of(model: ModelInfo) -> int:
    """How many rounded distances there are between tokens of an image."""
    height, width = model.grid
    return round(math.hypot(height - 1, width - 1)) + 1


def observe(program: Program, tokens: bool = False) -> Program:
    """A copy with the prefill output `statistics`: for each layer a list of the values named in `OBSERVERS`.

    With `tokens`, those named in `TOKENS` follow: what each visual token receives.

    program: one whose prefill graph is as `foveate.ir.split.split` leaves it, where the last layer still works for all
    tokens. Raises TraceError for a layer that passes or `keep_last` have changed already.
    """
    copy = program.copy()
    edit = Rewriter(copy, copy.prefill, by="observe")
    dense = list(edit.graph.nodes)
    layers = range(copy.info.layers)
    found = [_observe_layer(edit, layer) for layer in layers]
    received = [_observe_tokens(edit, layer) if tokens else [] for layer in layers]
    for layer in layers:
        found[layer] += [_observe_cut(edit, dense, layer), *received[layer]]
    edit.output({**outputs(edit.graph), "statistics": found})
    edit.sweep()
    return copy


def _observe_layer(edit: Rewriter, layer: int) -> list[fx.Node | None]:
    nodes = [attentions(edit.graph, layer, stream) for stream in ("visual", "text")]
    if any(len(found) != 1 or found[0].target != ops.attention for found in nodes):
        raise TraceError(f"layer {layer} cannot be observed: not every token attends there as in the dense split form")
    down = nodes_of(
        edit.graph, stream="visual", role=edit.program.info.roles["down"], layer=layer, op=torch.ops.aten.linear.default
    )
    (visual_node,), (text_node,) = nodes
    visual, text = Attention.of(visual_node), Attention.of(text_node)
    if not (visual.plain and text.plain):
        raise TraceError(f"layer {layer} cannot be observed: a token does not see just all tokens before it there")
    order = visual.q_order[0]
    about = NodeInfo(layer, "statistics", "none", "observe", (visual_node.name, text_node.name))
    coords = coords_at(edit, order)
    with edit.after(max(visual_node, text_node)):
        counted = edit.call(
            ops.attention_statistics,
            [visual.q[0], text.q[0]],
            text.k,
            [visual_node, text_node],
            [order, text.q_order[0]],
            text.k_order,
            coords,
            distances_of(edit.program.info),
            text.scale,
            about=about,
        )
        items = [edit.item(counted, place, about) for place in range(4)]
    if not down or shape(args_of(down[0])[0])[-1] != edit.program.info.intermediate_size:
        return [*items, None]
    with edit.after(down[0]):
        neurons = edit.call(ops.activity, args_of(down[0])[0], order, about=about.with_(origin=(down[0].name,)))
    return [*items, neurons]


def _observe_tokens(edit: Rewriter, layer: int) -> list[fx.Node]:
    """What visual tokens receive from text and from each other (FitPrune, arXiv 2409.10197)."""
    found = []
    for stream in ("text", "visual"):
        (node,) = attentions(edit.graph, layer, stream)
        about = NodeInfo(layer, "statistics", "none", "observe", (node.name,))
        with edit.after(node):
            found.append(edit.call(ops.received_attention, *taken_apart(node).received, about=about))
    return found


def _observe_cut(edit: Rewriter, dense: list[fx.Node], layer: int) -> fx.Node:
    """How far the prediction moves when text sees text only from `layer` on (VTW, arXiv 2405.05803)."""
    blind: dict[fx.Node, fx.Node] = {}
    logits = outputs(edit.graph)["logits"]
    with edit.before(edit.graph.output_node()):
        for node in dense:
            # Text reads nothing of the visual stream from here on, so that stream needs no copy.
            if node.op != "call_function" or info(node).stream == "visual":
                continue
            cut = node.target == ops.attention and info(node).layer >= layer
            if cut or any(source in blind for source in node.all_input_nodes):
                args = Attention.of(node).without_visual().args if cut else node.args
                blind[node] = edit.like(node, map_arg(args, lambda n: blind.get(n, n)))
        about = NodeInfo(layer, "statistics", "none", "observe", (logits.name,))
        return edit.call(ops.divergence, blind[logits], logits, about=about)


def only_statistics(program: Program) -> fx.Graph:
    """The prefill graph of an observed program, without what only its other outputs need."""
    copy = program.copy()
    edit = Rewriter(copy, copy.prefill, by="observe")
    edit.output({"statistics": outputs(edit.graph)["statistics"]})
    edit.sweep()
    return edit.graph
