"""From `torch.nn.Module` to a graph in canonical form.

`torch.export` records the module with every attention call captured as one opaque op; `import_graph` then copies
the recording into a program: each op takes its canonical form (`foveate.ir.canonical`), weights are looked up by
name, and each node learns its layer and role from its module path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from foveate import ops
from foveate.errors import TraceError
from foveate.ir import repeated
from foveate.ir.attention import Attention
from foveate.ir.canonical import canonical, unfuse
from foveate.ir.program import NodeInfo, Program
from foveate.ir.rewriter import Rewriter, map_arg
from foveate.ir.select import token_inputs
from foveate.ir.tokens import token_axes

# Towers that take all images in one packed sequence hand over its bounds only to what is named after flash attention.
_TRACE_NAME = "foveate_flash"
repeated.LIBRARY.define("attention(Tensor q, Tensor k, Tensor v, float scale, bool causal, int window) -> Tensor")
_captured = torch.ops.foveate_trace.attention.default


@torch.library.register_fake("foveate_trace::attention", lib=repeated.LIBRARY)
def _captured_fake(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], q.shape[3])


def _capture(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    windows: bool = False,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls while a model is traced."""
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    causal = bool(getattr(module, "is_causal", True))
    window = options.get("sliding_window") if windows and causal else None
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if options.get(name) is not None and not (window and name == "sliding_window"):
            raise TraceError(f"{type(module).__name__} attends with `{name}`, which foveate does not know")
    bounds = options.get("cu_seq_lens_q")
    if bounds is not None:
        if causal or options.get("cu_seq_lens_k") is not bounds:
            raise TraceError(f"{type(module).__name__} attends over a packed sequence that is causal or of two lengths")
        return ops.varlen_attention(query, key, value, bounds, scale), None
    return _captured(query, key, value, scale, causal, window or 0), None


@contextmanager
def captured_attention(model: Any, windows: bool = False) -> Iterator[None]:
    """While open, every attention call of a transformers model is one opaque op; afterwards nothing is left.

    windows: whether causal layers may see the last so many tokens only.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    training = {m: m.training for m in model.modules()}
    with ExitStack() as stack:
        capture = partial(_capture, windows=windows)
        for interface, function in ((AttentionInterface, capture), (AttentionMaskInterface, lambda *a, **k: None)):
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
        # An entry of that cache takes longer to make than most ops, of which few come twice: layers are recorded once.
        with torch.no_grad(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            return torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
    except (TraceError, repeated.UnequalError):
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
    reach: bool = False,
) -> fx.Graph:
    """Copy a recording into `program` in canonical form.

    inputs: fakes for the recording's own inputs, in order. layers: how many layers there are, for nodes after the
    last. names: parameter name in the recording -> name in the program. With `causal`, an `order` input [batch,
    sequence] is added and attention becomes `foveate::attention`; otherwise `foveate::encoder_attention`. With `reach`,
    so is an input of that name: the order of the last key that each token sees.
    The graph returns `{"out": value, "kv": [[None, None, k, v] a layer]}` (`kv` only when causal); a second value of
    the recording, if there is one, is `deepstack`. Raises TraceError for an op that cannot be imported, or for one
    before it that mixes tokens.
    """
    importer = _Importer(program, exported, layers, names, causal, reach)
    try:
        return importer.run(exported.graph.nodes, inputs)
    except TraceError:
        if causal:
            # Where tokens are mixed, as by linear attention, what cannot be imported is often a consequence.
            token_axes(importer.edit.graph, token_inputs(importer.edit.graph))
        raise


class _Importer:
    def __init__(
        self, program: Program, exported: Any, layers: int, names: Callable[[str], str], causal: bool, reach: bool
    ) -> None:
        self.edit = Rewriter(program, fx.Graph(), by="trace")
        signature = exported.graph_signature
        self.weights = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.weights |= signature.inputs_to_lifted_tensor_constants
        self.names = names
        self.causal = causal
        self.where = _Where(layers)
        self.added = [name for name, wanted in (("order", causal), ("reach", causal and reach)) if wanted]
        self.made: dict[str, fx.Node] = {}
        self.kv: list[list[fx.Node | None]] = []
        self.values: dict[fx.Node, Any] = {}
        self.regions: dict[str, list[fx.Node]] = {}

    def run(self, nodes: Any, inputs: dict[str, Tensor]) -> fx.Graph:
        edit = self.edit
        placeholders = dict(inputs)
        for name in self.added:
            placeholders[name] = edit.program.symbols.tensor(
                "batch", "sequence", dtype=torch.int64, device=next(iter(inputs.values())).device
            )
        made = {
            name: edit.placeholder(name, value, NodeInfo(-1, name, "joint" if self.causal else "none"))
            for name, value in placeholders.items()
        }
        self.made = made
        given = iter(list(made.values())[: len(inputs)])
        region: list[fx.Node] = []
        for node in nodes:
            if node.op == "placeholder":
                self.values[node] = self._weight(node) if node.name in self.weights else next(given)
            elif node.op == "output":
                made = dict(zip(("out", "deepstack"), (self.values[x] for x in node.args[0]), strict=False))
                edit.output({**made, "kv": self.kv} if self.causal else made)
            elif node.op != "call_function":
                raise TraceError(f"unexpected `{node.op}` node {node.name} in the recording")
            elif node.target == repeated.begin:
                region = self.regions[node.args[1]] = [node]
                self.values[node] = self.values[node.args[0]]
            elif node.target == repeated.end:
                region.append(node)
                region = []
                self.values[node] = self.values[node.args[0]]
            elif node.target == repeated.again:
                self.values[node] = self._again(*node.args)
            else:
                region.append(node)
                self.values[node] = self._write(node, self.values.__getitem__, self.where.place(node))
        edit.sweep()
        unfuse(edit)
        edit.merge_equal()
        return edit.graph

    def _again(self, source: fx.Node, path: str, of: str) -> Any:
        """What was recorded of layer `of`, written once more with the weights of layer `path`."""
        begin, *inside, end = self.regions[of]
        values = {begin: self.values[source]}

        def value(node: fx.Node) -> Any:
            if node in values:
                return values[node]
            return self._weight(node, of, path) if node.name in self.weights else self.values[node]

        for node in inside:
            about = self.where.place(node)
            own = about.with_(layer=int(path.rpartition(".")[2])) if about.layer >= 0 else about
            values[node] = self._write(node, value, own)
        (result,) = end.all_input_nodes
        return value(result)

    def _weight(self, node: fx.Node, of: str = "", path: str = "") -> fx.Node:
        """The weight that a recorded input is; one of layer `of` is that of layer `path` instead."""
        name = self.weights[node.name]
        wrapper, found, inner = name.partition(f"{of}.") if of else ("", "", "")
        return self.edit.weight(self.names(f"{wrapper}{path}.{inner}" if found else name))

    def _write(self, node: fx.Node, value: Callable[[fx.Node], Any], about: NodeInfo) -> Any:
        """A recorded node in canonical form; value: what stands for its arguments."""
        args = map_arg(node.args, value)
        if node.target is not _captured:
            return canonical(self.edit, node, args, map_arg(node.kwargs, value), about)
        q, k, v, scale, is_causal, window = args
        if bool(is_causal) != self.causal:
            raise TraceError(f"{about.role}: attention is {'' if is_causal else 'not '}causal there")
        if not self.causal:
            return self.edit.call(ops.encoder_attention, q, k, v, scale, about=about)
        self.kv.append([None, None, k, v])
        order, reach = ([self.made[n]] if n in self.made else None for n in ("order", "reach"))
        assert order is not None  # a causal graph takes it
        whole = Attention([q], [k], [v], order, order, -1, "s:s", scale, reach, window)
        return self.edit.call(ops.attention, *whole.args, about=about)


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
        found = re.search(r"(?:^|\.)(?:layers?|blocks)\.(\d+)\.?(.*)$", path)
        if found:
            self.entered = True
            return NodeInfo(int(found[1]), found[2] or "residual")
        return NodeInfo(self.layers if self.entered else -1, path.rpartition(".")[2] or "model")
