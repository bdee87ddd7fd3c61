"""What makes a program valid, as a list of rules; `verify` runs them all.

A rule looks at one graph and yields (node, complaint). Add a rule by writing a function and naming it in `RULES`.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, fx

from foveate.errors import TraceError, VerifyError
from foveate.ir.attention import Attention, attentions, taken_apart
from foveate.ir.program import TOWER, NodeInfo, Program, args_of, layer_kv, outputs
from foveate.ir.rewriter import shape
from foveate.ir.select import token_inputs
from foveate.ir.text import OPS
from foveate.ir.tokens import token_axes

Complaints = Iterator[tuple[fx.Node, str]]
Rule = Callable[[Program, str, fx.Graph], Complaints]


INPUTS = {
    "vision": r"pixel_values|questions|patch_positions|cu_(window_)?seqlens|interp_(indices|weights)",
    "vision_rest": r"hidden|places|count",
    "prefill": r"visual|text|(visual|text)_(position_ids|order|deepstack|reach)|visual_coords|grids|prefix",
    "decode": r"text|text_position_ids|text_order|past_order|prefix|visual_order|kept_\d+|(past|visual)_[kv]_\d+"
    r"|held_(k|v|order)_\d+",
}
"""What the inputs of each graph may be called."""

OUTPUTS = {"vision": {"out"}, "vision_rest": {"out"}, "prefill": {"logits", "kv", "kept"}, "decode": {"logits", "kv"}}
"""What each graph returns."""

BESIDES = {
    "vision": {"source", "count", "stays", "deepstack"},
    "vision_rest": {"source", "count"},
    "prefill": {"statistics", "held"},
    "decode": {"scores"},
}
"""What a graph may return besides; see `foveate.ir`: `vision`, `packed`, `observe` and `kv`."""


def interface(program: Program, name: str, graph: fx.Graph) -> Complaints:
    """Graphs take and return what the runtime gives and expects."""
    for node in graph.nodes:
        if node.op == "placeholder" and not re.fullmatch(INPUTS[name], str(node.target)):
            yield node, f"is no input of a {name} graph"
    end = graph.output_node()
    result = args_of(end)[0]
    if not isinstance(result, dict) or set(result) - BESIDES.get(name, set()) != OUTPUTS[name]:
        yield end, f"does not return exactly {', '.join(sorted(OUTPUTS[name]))}"
    elif not isinstance(result.get("out", result.get("logits")), fx.Node):
        yield end, "does not return a value"
    elif not isinstance(result.get("kept", {}), dict) or not all(str(k).isdigit() for k in result.get("kept", {})):
        yield end, "has kept tokens that are not by layer"
    elif not all(map(_four, result.get("kv", ()))):
        yield end, "has keys and values that are not four a layer"


def _four(entry: object) -> bool:
    """Keys and values of text, maybe of the image before them; or those of one block of both."""
    return isinstance(entry, (list, tuple)) and len(entry) == 4 and bool(all(entry[2:]) or all(entry[:2]))


def made_before_use(program: Program, name: str, graph: fx.Graph) -> Complaints:
    """Values are made before they are used."""
    seen: set[fx.Node] = set()
    for node in graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                yield node, f"uses {source.name} before it is made"
        seen.add(node)


def known_ops(program: Program, name: str, graph: fx.Graph) -> Complaints:
    """Graphs call ops of the known set, and take results apart; nothing else."""
    for node in graph.nodes:
        if node.op in ("call_module", "call_method"):
            yield node, f"a `{node.op}` node; only inputs, weights, ops and one output may stand in a graph"
        elif node.op == "call_function" and node.target is not operator.getitem and str(node.target) not in OPS:
            yield node, f"calls {node.target}, which is not in foveate.ir.text.OPS"


def described(program: Program, name: str, graph: fx.Graph) -> Complaints:
    """Every node says why it is there and what shape it has."""
    for node in graph.nodes:
        if not isinstance(node.meta.get("foveate"), NodeInfo):
            yield node, "has no NodeInfo"
        elif node.op != "output" and "val" not in node.meta:
            yield node, "has no shape"


def weights_exist(program: Program, name: str, graph: fx.Graph) -> Complaints:
    """Weights that a graph reads are in the program."""
    for node in graph.nodes:
        if node.op == "get_attr" and node.target not in program.weights.names:
            yield node, f"reads the weight {node.target}, which the program does not have"


def nothing_dead(program: Program, name: str, graph: fx.Graph) -> Complaints:
    """Every computed value is used."""
    for node in graph.nodes:
        if node.op in ("call_function", "get_attr") and not node.users:
            yield node, "computes what nothing uses"


def tokens_apart(program: Program, name: str, graph: fx.Graph) -> Complaints:
    """In the decoder nothing but attention and selection mixes tokens."""
    if name != "prefill":
        return
    try:
        token_axes(graph, token_inputs(graph))
    except TraceError as error:
        yield graph.output_node(), str(error)


def attention_fits(program: Program, name: str, graph: fx.Graph) -> Complaints:
    """Attention has as many streams as its layout names, and whole groups of query heads a key head."""
    for node in attentions(graph):
        a = taken_apart(node)
        streams = len(a.k) == len(a.v) == len(a.k_order) == len(a.keys)
        if isinstance(a, Attention):
            reach = a.q_order if a.reach is None else a.reach
            streams = streams and len(a.q) == len(a.q_order) == len(reach) == len(a.layout.partition(":")[0])
            if not streams:
                yield node, f"has {len(a.q)} query and {len(a.k)} key streams for the layout {a.layout!r}"
        elif not streams:
            yield node, f"has {len(a.k)} key streams, and takes visual keys and maybe text keys"
        for key in (*a.k, *a.v):
            heads, kv_heads = shape(a.queries[0])[1], shape(key)[1]
            if heads % kv_heads:
                yield node, f"has {heads} query heads for {kv_heads} key heads"


def kv_complete(program: Program, name: str, graph: fx.Graph) -> Complaints:
    """Prefill and decode return keys and values of every layer, 4-D, keys as long as values."""
    if name in TOWER:
        return
    entries = layer_kv(graph)
    if len(entries) != program.info.layers:
        yield graph.output_node(), f"returns {len(entries)} layers of keys and values, not {program.info.layers}"
    for layer in entries:
        for pair in (layer.text, layer.visual, layer.held):
            if pair and any(x.meta["val"].dim() != 4 for x in pair):
                yield pair[0], "keys and values are not [batch, heads, tokens, head size]"
            elif pair and pair[0].meta["val"].shape != pair[1].meta["val"].shape:
                yield pair[0], f"keys {tuple(pair[0].meta['val'].shape)} and values do not have the same shape"


def returns_logits(program: Program, name: str, graph: fx.Graph) -> Complaints:
    """Decoder graphs return logits [batch, 1, vocabulary] of a floating type."""
    if name in TOWER:
        return
    logits = outputs(graph)["logits"]
    value: Tensor = logits.meta["val"]
    if value.dim() != 3 or value.shape[1] != 1 or value.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        yield logits, f"logits are {value.dtype} {tuple(value.shape)}, not [batch, 1, vocabulary]"


RULES: tuple[Rule, ...] = (
    interface,
    made_before_use,
    known_ops,
    described,
    weights_exist,
    nothing_dead,
    kv_complete,
    returns_logits,
    attention_fits,
    tokens_apart,
)


def verify(program: Program) -> None:
    """Check every graph against every rule.

    Raises VerifyError naming the graph, the node, the rule and the complaint of the first violation.
    """
    for name, graph in program.graphs.items():
        for rule in RULES:
            for node, complaint in rule(program, name, graph):
                raise VerifyError(f"{name} graph, node {node.name}: {complaint} (rule {rule.__name__})")
