"""Keeping some visual tokens from a layer on: live-range splitting.

    before                                    after
    layer l-1 makes h.visual                  layer l-1 makes h.visual
                                              index, order' = top_tokens(scores, order, keep)
    layer l reads h.visual, cos.visual        layer l reads take(h.visual, index), take(cos.visual, index)

Every visual value that is made before the layer and read in it or later is gathered, once; what is read only
before the layer, earlier keys and values included, stays whole.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from foveate import ops
from foveate.errors import PassError
from foveate.ir.attention import Attention, attentions
from foveate.ir.program import NodeInfo, Stream, args_of, info, outputs
from foveate.ir.rewriter import Rewriter, shape
from foveate.ir.tokens import Axes, token_axes

aten = torch.ops.aten


def first_of_layer(graph: fx.Graph, layer: int) -> fx.Node:
    """The first node that computes something for `layer` or a later one."""
    node: fx.Node
    for node in graph.nodes:
        if node.op == "output" or (node.op == "call_function" and info(node).layer >= layer):
            return node
    raise AssertionError("a graph has an output node")


def visual_order_at(graph: fx.Graph, layer: int) -> fx.Node:
    """The order tensor of the visual tokens that enter `layer`."""
    orders: dict[int, fx.Node] = {int(at): node for at, node in outputs(graph)["kept"].items() if int(at) < layer}
    orders[-1] = next(n for n in graph.nodes if n.op == "placeholder" and n.name == "visual_order")
    return orders[max(orders)]


def coords_at(edit: Rewriter, order: fx.Node) -> fx.Node:
    """Image, row and column [B, n, 3] of the visual tokens whose places are `order`; selections are followed."""
    if order.op == "placeholder":
        return edit.input("visual_coords", ("batch", "visual_tokens", 3), NodeInfo(-1, "coords", "visual"))
    chosen = args_of(order)[0]
    index = next(user for user in chosen.users if args_of(user)[1] == 0)
    before = coords_at(edit, args_of(chosen)[1])
    for user in before.users:
        if user.target == ops.take_tokens and args_of(user)[1] is index:
            return user
    with edit.after(index):
        about = info(index).with_(role="coords", by=edit.by, origin=(before.name,))
        return edit.call(ops.take_tokens, before, index, 1, about=about)


def live_into(graph: fx.Graph, layer: int, stream: Stream = "visual") -> dict[fx.Node, list[fx.Node]]:
    """A stream's values made before `layer` -> their users in it or later (the graph's output is no user)."""
    live: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if info(node).stream == stream and info(node).layer < layer and isinstance(node.meta["val"], Tensor):
            users = [u for u in node.users if u.op == "call_function" and info(u).layer >= layer]
            if users:
                live[node] = users
    return live


def hidden_into(edit: Rewriter, layer: int, stream: Stream = "visual") -> fx.Node:
    """The hidden states of the tokens of a stream that enter `layer`: [B, n, D]."""
    size, graph = edit.program.info.hidden_size, edit.graph
    text = (n for n in graph.nodes if n.name == "text_order")
    order = visual_order_at(graph, layer) if stream == "visual" else next(text)
    values = [n for n in live_into(graph, layer, stream) if shape(n)[1:] == (shape(order)[1], size)]
    return values[-1]


def made_in(layer: int, values: list[fx.Node]) -> set[fx.Node]:
    """The nodes of `layer` that values are computed from, themselves included."""
    found: set[fx.Node] = set()
    stack = list(values)
    while stack:
        node = stack.pop()
        if node.op == "call_function" and info(node).layer >= layer and node not in found:
            found.add(node)
            stack += node.all_input_nodes
    return found


def part_behind(edit: Rewriter, layer: int, done: list[fx.Node]) -> tuple[fx.Node, dict[fx.Node, list[fx.Node]]]:
    """Put what `layer` computes without looking at `done`, nodes of it, and `done` itself before all that looks there.

    Returns the first node that does, and what lives from there on: as `live_into`, where tokens are selected behind
    `done`. The output is no user, so that the cache holds what the layer's attention saw.
    """
    graph = edit.graph
    behind: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if any(source in behind or source in done for source in node.all_input_nodes):
            behind[node] = None
    before = [n for n in graph.nodes if n.op == "call_function" and info(n).layer == layer and n not in behind]
    start, early = next(iter(behind)), set(before)
    edit.hoist(before, start)
    live: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        made = info(node).layer < layer or node in early
        if made and info(node).stream == "visual" and isinstance(node.meta["val"], Tensor):
            users = [u for u in node.users if u.op == "call_function" and info(u).layer >= layer and u not in early]
            if users:
                live[node] = users
    return start, live


def live_beside(graph: fx.Graph, layer: int, needed: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """As `live_into`, where nodes of the layer itself, `needed`, are computed before tokens are selected.

    What they made for the rest of the layer is in it too, and the output is their user: the cache holds what is left.
    """
    live: dict[fx.Node, list[fx.Node]] = {}
    for node, users in live_into(graph, layer).items():
        if rest := [u for u in users if u not in needed]:
            live[node] = rest
    for node in graph.nodes:
        rest = [u for u in node.users if u not in needed]
        if rest and node in needed and info(node).stream == "visual" and isinstance(node.meta["val"], Tensor):
            live[node] = rest
    return live


def keep_tokens(
    edit: Rewriter,
    layer: int,
    scores: fx.Node,
    keep: float,
    live: dict[fx.Node, list[fx.Node]],
    whole: fx.Node | None = None,
    merged: fx.Node | None = None,
) -> None:
    """From `layer` on, only the floor(keep * n) visual tokens with the highest scores exist.

    scores: [B, n] fp32, computed from what enters the layer, or in the layer before, where tokens then go at once.
    live: visual values -> their users from then on, such as `live_into(graph, layer)` finds them; taken before the
    scores were added. whole: the order of the tokens that `keep` is a share of, if they are not those that are left.
    merged: hidden states of which some of those that go are added to as clusters. The places of the kept tokens become
    the output `kept[layer]`.
    """
    if keep * edit.program.symbols.HINTS["visual_tokens"] < 2:
        raise PassError(
            f"{edit.by}: a share of {keep:g} leaves no visual token; cut-visual{{from_layer={layer}}} says so"
        )
    about = NodeInfo(info(scores).layer, "select", "visual", edit.by)
    order = visual_order_at(edit.graph, layer)
    with edit.after(scores):
        if merged is None:
            counted = () if whole is None or whole is order else (whole,)
            chosen = edit.call(ops.top_tokens, scores, order, keep, *counted, about=about)
        else:
            chosen = edit.call(ops.recycle_tokens, scores, order, merged, whole or order, keep, about=about)
    take_chosen(edit, layer, chosen, live, merged)


def keep_by_rank(
    edit: Rewriter,
    layer: int,
    scores: fx.Node,
    rank: fx.Node,
    scale: float,
    live: dict[fx.Node, list[fx.Node]],
    hidden: fx.Node,
    recycle: bool,
) -> None:
    """As `keep_tokens`, where of a row's n tokens floor(scale * (n - rank)) go; `recycle`: into clusters of `hidden`.

    rank: int64 [B], at most the number of text tokens. Counts differ between prompts, so that behind `layer` visual
    tokens may be padding in any of them.
    """
    text = next(n for n in edit.graph.nodes if n.name == "text_order")
    given = scores, visual_order_at(edit.graph, layer), hidden, rank, text, scale, recycle
    with edit.after(rank):
        chosen = edit.call(ops.rank_tokens, *given, about=NodeInfo(layer, "select", "visual", edit.by))
    take_chosen(edit, layer, chosen, live, hidden if recycle else None)
    for node in attentions(edit.graph):
        if info(node).layer >= layer and node.target == ops.attention:
            edit.set_args(node, replace(Attention.of(node), prefix=-1).args)


def take_chosen(
    edit: Rewriter,
    layer: int,
    chosen: fx.Node,
    live: dict[fx.Node, list[fx.Node]],
    merged: fx.Node | None = None,
) -> None:
    """From `layer` on, only chosen visual tokens exist: what `keep_tokens` does with its choice.

    chosen: a node that returns index, order and, where some are `merged`, weights; see `foveate.ops.recycle_tokens`.
    """
    graph, about = edit.graph, info(chosen)
    axes: Axes = token_axes(graph, token_inputs(graph))
    order = visual_order_at(graph, layer)
    with edit.after(chosen):
        index, kept = edit.item(chosen, 0, about), edit.item(chosen, 1, about)
        for node, users in live.items():
            origin = about.with_(role=info(node).role, origin=(node.name,))
            if node is order:
                new = kept
            elif node is merged:
                new = edit.call(ops.merge_tokens, node, edit.item(chosen, 2, about), about=origin)
            else:
                new = edit.call(ops.take_tokens, node, index, axes[node], about=origin)
            edit.replace(node, new, where=users.__contains__)
    result = dict(outputs(graph))
    result["kept"] = dict(sorted({**result["kept"], str(layer): kept}.items(), key=lambda item: int(item[0])))
    edit.output(result)
    edit.refresh()
    edit.sweep()


def token_inputs(graph: fx.Graph) -> dict[str, int]:
    """Token axis of each input of a decoder graph: axis 1 of embeddings and coordinates, the last of all others."""
    values = {n.name: n.meta["val"] for n in graph.nodes if n.op == "placeholder" and n.name != "grids"}
    return {
        name: 1 if value.is_floating_point() or name == "visual_coords" else value.dim() - 1
        for name, value in values.items()
        if isinstance(value, Tensor)
    }
