"""From `torch.nn.Module` to a graph in canonical form.

`torch.export` records the module with every attention call captured as one opaque op; `import_graph` then copies
the recording into a program: no-ops vanish, reshapes become `flatten` and `unflatten` (which do not name the
number of tokens), weights are looked up by name, and each node learns its layer and role from its module path.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from foveate import ops
from foveate.errors import TraceError
from foveate.ir.program import NodeInfo, Program
from foveate.ir.rewriter import Rewriter, map_arg, shape

aten = torch.ops.aten

_TRACE_NAME = "foveate_trace"
_LIBRARY = torch.library.Library("foveate_trace", "DEF")
_LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, float scale, bool causal) -> Tensor")
_captured = torch.ops.foveate_trace.attention.default


@torch.library.register_fake("foveate_trace::attention", lib=_LIBRARY)
def _captured_fake(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def _capture(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """The attention function that transformers calls while a model is traced."""
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise TraceError(f"{type(module).__name__} attends with `{name}`, which foveate does not know")
    causal = bool(getattr(module, "is_causal", True))
    return _captured(query, key, value, scale, causal), None


@contextmanager
def captured_attention(model: Any) -> Iterator[None]:
    """While open, every attention call of a transformers model is one opaque op; afterwards nothing is left."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    training = {m: m.training for m in model.modules()}
    with ExitStack() as stack:
        for interface, function in ((AttentionInterface, _capture), (AttentionMaskInterface, lambda *a, **k: None)):
            interface.register(_TRACE_NAME, function)
            stack.callback(interface._global_mapping.pop, _TRACE_NAME)
        # Setting an outer configuration sets those inside it, so those are restored last (callbacks run backwards).
        for key, config in reversed(configs.items()):
            stack.callback(setattr, config, "_attn_implementation", before[key])
            config._attn_implementation = _TRACE_NAME
        for module, was in training.items():
            stack.callback(setattr, module, "training", was)
        model.eval()
        yield


def record(module: nn.Module, inputs: tuple[Tensor, ...], dynamic: tuple[dict[int, Any], ...]) -> Any:
    """`torch.export` of a module whose axes named in `dynamic` may have any size."""
    try:
        with torch.no_grad():
            return torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
    except TraceError:
        raise
    except Exception as error:  # torch.export raises whatever the model raised; the first line says what
        raise TraceError(f"the model could not be traced: {str(error).splitlines()[0]}") from error


def import_graph(
    program: Program,
    exported: Any,
    inputs: dict[str, Tensor],
    layers: int,
    names: Callable[[str], str],
    causal: bool,
) -> fx.Graph:
    """Copy a recording into `program` in canonical form.

    inputs: fakes for the recording's own inputs, in order. layers: how many layers there are, for nodes after the
    last. names: parameter name in the recording -> name in the program. With `causal`, an `order` input [batch,
    sequence] is added and attention becomes `foveate::attention`; otherwise `foveate::encoder_attention`.
    The graph returns `{"out": value, "kv": [[None, None, k, v] a layer]}` (`kv` only when causal).
    """
    graph = fx.Graph()
    edit = Rewriter(program, graph, by="trace")
    environment: dict[fx.Node, Any] = {}
    signature = exported.graph_signature
    weight_names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    weight_names |= signature.inputs_to_lifted_tensor_constants
    placeholders = dict(inputs)
    order = None
    if causal:
        placeholders["order"] = program.symbols.tensor(
            "batch", "sequence", dtype=torch.int64, device=next(iter(inputs.values())).device
        )
    made = {
        name: edit.placeholder(name, value, NodeInfo(-1, name, "joint" if causal else "none"))
        for name, value in placeholders.items()
    }
    order = made.get("order")
    user_inputs = iter(list(made.values())[: len(inputs)])
    where = _Where(layers)
    kv: list[list[fx.Node | None]] = []
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            known = weight_names.get(node.name)
            environment[node] = edit.weight(names(known)) if known else next(user_inputs)
        elif node.op == "call_function":
            about = where.place(node)
            args = map_arg(node.args, lambda n: environment[n])
            if node.target is _captured:
                q, k, v, scale, is_causal = args
                if bool(is_causal) != causal:
                    raise TraceError(f"{about.role}: attention is {'' if is_causal else 'not '}causal there")
                if causal:
                    kv.append([None, None, k, v])
                    args = ([q], [k], [v], [order], [order], -1, "s:s", scale)
                    environment[node] = edit.call(ops.attention, *args, about=about)
                else:
                    environment[node] = edit.call(ops.encoder_attention, q, k, v, scale, about=about)
            else:
                kwargs = map_arg(node.kwargs, lambda n: environment[n])
                environment[node] = _canonical(edit, node, args, kwargs, about)
        elif node.op == "output":
            result = environment[node.args[0][0]]
            edit.output({"out": result, "kv": kv} if causal else {"out": result})
        else:
            raise TraceError(f"unexpected `{node.op}` node {node.name} in the recording")
    edit.sweep()
    edit.merge_equal()
    return graph


class _Where:
    """Layer and role of recorded nodes, from the module stack that torch.export keeps."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.entered = False

    def place(self, node: fx.Node) -> NodeInfo:
        stack = node.meta.get("nn_module_stack") or {}
        path = next(reversed(stack.values()))[0] if stack else ""
        if path.startswith("_empty_nn_module_stack"):
            path = ""  # torch.export's name for "no module"
        found = re.search(r"(?:^|\.)layers\.(\d+)\.?(.*)$", path)
        if found:
            self.entered = True
            return NodeInfo(int(found[1]), found[2] or "residual")
        return NodeInfo(self.layers if self.entered else -1, path.rpartition(".")[2] or "model")


_NOTHING = {
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
}
_SAME = {
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.clone.default,
    aten.lift_fresh_copy.default,
}
_RESHAPE = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_CAST = {aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device}


def _canonical(edit: Rewriter, node: fx.Node, args: Any, kwargs: Any, about: NodeInfo) -> Any:
    """One recorded op in canonical form: a new node, or an old one where the op does nothing."""
    op = node.target
    if op in _NOTHING:
        return None
    if op in _SAME or (op == aten.dropout.default and (args[1] == 0 or not args[2])):
        return args[0]
    if op in _RESHAPE:
        return _reshape(edit, node, args, about)
    if op in _CAST:
        dtype = next((a for a in (*args[1:], *kwargs.values()) if isinstance(a, torch.dtype)), None)
        same = dtype is None or args[0].meta["val"].dtype == dtype
        return args[0] if same else edit.call(aten.to.dtype, args[0], dtype, about=about)
    if op is operator.getitem:
        return edit.item(args[0], args[1], about)
    if not isinstance(op, torch._ops.OpOverload):
        raise TraceError(f"layer {about.layer}, {about.role}, node {node.name}: {op} is not an op that can be imported")
    if op == aten.matmul.default and shape(args[0])[-1] == 1 and shape(args[0])[:-2] == shape(args[1])[:-2]:
        # An outer product, as some versions write rotary angles, is elementwise and costs no matmul.
        return edit.call(aten.mul.Tensor, *args, about=about)
    result = edit.call(op, *args, about=about, **kwargs)
    noop = op in (aten.slice.Tensor, aten.expand.default) and shape(result) == shape(args[0])
    if noop:
        edit.graph.erase_node(result)
        return args[0]
    return result


def _reshape(edit: Rewriter, node: fx.Node, args: Any, about: NodeInfo) -> fx.Node:
    """A view as `flatten` or `unflatten` of neighbouring axes, so that it holds for any number of tokens."""
    source: fx.Node = args[0]
    recorded: Any = node.args[0]
    # Both shapes as the recording has them, so that symbolic sizes can be compared by name.
    old, new = ([_plain_size(s) for s in n.meta["val"].shape] for n in (recorded, node))
    at = min(len(old), len(new)) - 1
    if old == new:
        return source
    if old[:at] == new[:at] and all(isinstance(s, int) for s in (*old[at:], *new[at:])):
        if len(new) > len(old) and old[at] == math.prod(new[at:]):
            return edit.call(aten.unflatten.int, source, at, new[at:], about=about)
        if len(new) < len(old) and new[at] == math.prod(old[at:]):
            return edit.call(aten.flatten.using_ints, source, at, len(old) - 1, about=about)
    raise TraceError(
        f"layer {about.layer}, {about.role}, node {node.name}: cannot read the reshape {tuple(old)} -> {tuple(new)}"
    )


def _plain_size(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
