"""What a traced model is: named FX graphs over one set of weights, and what each node is there for.

Every node carries a `NodeInfo` in `node.meta["foveate"]` and a fake value with symbolic sizes in `node.meta["val"]`.
The sizes are named: `batch`, `visual_tokens`, `text_tokens`, `images`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

Stream = Literal["visual", "text", "joint", "none"]
GRAPHS = ("vision", "prefill", "decode")


@dataclass(frozen=True)
class NodeInfo:
    """Why a node exists.

    layer: decoder (or tower) layer; -1 before the first, the number of layers after the last.
    role: module path inside the layer, such as `self_attn.q_proj`, or what foveate calls the value.
    stream: which tokens the value belongs to; `none` for values without a token axis, `joint` for both.
    by: the step that made it (`trace`, `split`, or a pass); origin: names of the nodes it was made from.
    twin: the joint value that both streams' versions of this value come from; `join` looks for it.
    """

    layer: int
    role: str
    stream: Stream = "none"
    by: str = ""
    origin: tuple[str, ...] = ()
    twin: str = ""

    def with_(self, **changes: Any) -> NodeInfo:
        """A copy with some fields changed."""
        return replace(self, **changes)


def info(node: fx.Node) -> NodeInfo:
    """The `NodeInfo` of a node."""
    value = node.meta["foveate"]
    assert isinstance(value, NodeInfo)
    return value


class Symbols:
    """One fake-tensor world for a whole program: named symbolic sizes, and fakes that use them."""

    # Unequal hints, none of them 0 or 1, so that no guard can mistake one size for another or for a constant.
    HINTS: ClassVar[dict[str, int]] = {
        "batch": 3,
        "images": 5,
        "visual_tokens": 1031,
        "text_tokens": 211,
        "past_tokens": 307,
        "prefix": 23,
    }

    def __init__(self) -> None:
        self.mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        self.sizes: dict[str, Any] = {}
        self._values: dict[Any, Any] = {}
        self._results: dict[Any, Any] = {}

    def __getitem__(self, name: str) -> Any:
        """The symbolic size of that name, made on first use (any name: per-layer lengths have their own)."""
        if name not in self.sizes:
            hint = self.HINTS.get(name, 401 + 2 * len(self.sizes))
            context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            source = torch._dynamo.source.ConstantSource(f"size_{len(self.sizes)}")
            sample = torch.empty(hint, device="meta")
            fake = self.mode.from_tensor(sample, symbolic_context=context, source=source)
            self.sizes[name] = fake.shape[0]
        return self.sizes[name]

    def tensor(self, *shape: str | int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A fake tensor; sizes given by name are symbolic."""
        sizes = [self[s] if isinstance(s, str) else s for s in shape]
        with self.mode:
            return torch.empty(sizes, dtype=dtype, device=device)

    def shared(self, value: Any) -> Any:
        """The one object that stands for every value of this shape, dtype and device in the program."""
        if isinstance(value, (tuple, list)):
            return tuple(map(self.shared, value))
        if isinstance(value, Tensor):
            key: Any = (tuple(map(_expression, value.shape)), value.dtype, str(value.device))
        else:
            key = _expression(value)
        return self._values.setdefault(key, value)

    def evaluate(self, op: Any, args: Any, kwargs: Any) -> Any:
        """The shared value of op(*args, **kwargs); arguments are nodes, whose shared values are used, and constants.

        Layers repeat, so nearly every call has been made before: results are remembered by the values' identity.
        """
        key = (op, _frozen(args), _frozen(kwargs))
        if key not in self._results:
            fake_args, fake_kwargs = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
            with self.mode, torch.no_grad():
                result = op(*_plain(fake_args), **{k: _plain(v) for k, v in fake_kwargs.items()})
            self._results[key] = self.shared(result)
        return self._results[key]

    def names(self) -> dict[Any, str]:
        """sympy symbol -> name, for printing and substitution."""
        return {size.node.expr: name for name, size in self.sizes.items()}


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _frozen(value: Any) -> Any:
    """Arguments as a dictionary key: a node stands for its shared value."""
    if isinstance(value, fx.Node):
        return ("node", id(value.meta["val"]))
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    return (type(value), value)


def _plain(value: Any) -> Any:
    """FX's immutable lists as lists, which ops accept."""
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class ModelInfo:
    """What passes and the runtime need to know of a model: sizes, token ids, and where its weights are.

    paths: full weight names by short name: `embed` (token embedding) and so on. roles: what the family calls the
    linears of a decoder layer: q, k, v, o, gate, up, down. grid: rows and columns of an image's visual tokens.
    config: the Hugging Face configuration as a plain dictionary.
    """

    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    intermediate_size: int
    image_token_id: int
    grid: tuple[int, int]
    image_size: tuple[int, int, int]
    paths: dict[str, str]
    roles: dict[str, str]
    config: dict[str, Any]

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens that one image becomes."""
        return self.grid[0] * self.grid[1]


class Weights(nn.Module):
    """All weights of a program under their Hugging Face names, each stored once; graphs refer to them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}

    def put(self, name: str, value: Tensor) -> None:
        """Store a parameter or buffer under its dotted name, replacing what was there."""
        owner: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            if part not in owner._modules:
                owner.add_module(part, nn.Module())
            child = owner._modules[part]
            assert child is not None  # put is the only writer
            owner = child
        owner._parameters.pop(leaf, None)
        owner._buffers.pop(leaf, None)
        if isinstance(value, nn.Parameter):
            owner.register_parameter(leaf, value)
        else:
            owner.register_buffer(leaf, value)
        self.names[name] = None

    def get(self, name: str) -> Tensor:
        """The tensor of that name; KeyError if there is none."""
        if name not in self.names:
            raise KeyError(name)
        *path, leaf = name.split(".")
        owner = self.get_submodule(".".join(path))
        value = getattr(owner, leaf)
        assert isinstance(value, Tensor)
        return value

    def device(self) -> torch.device:
        """Where the weights are."""
        return self.get(next(iter(self.names))).device

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) in the order they were put."""
        return ((name, self.get(name)) for name in self.names)


@dataclass(frozen=True)
class LayerKV:
    """The values of one layer that decoding reads again, keys first: [B, kv heads, tokens, head size] each.

    `visual` is None where no later text looks at visual tokens.
    """

    visual: tuple[fx.Node, fx.Node] | None
    text: tuple[fx.Node, fx.Node]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to a program: its text, notes for the reader, edits by kind, or why it changed nothing.

    cost: before and after, at one image and 60 text tokens: `prefill_flops`, `kv_bytes`.
    """

    text: str
    notes: tuple[str, ...] = ()
    edits: dict[str, int] = field(default_factory=dict)
    skipped: str | None = None
    cost: dict[str, tuple[int, int]] | None = None


@dataclass
class Program:
    """Graphs by name (`vision`, `prefill`, `decode`), their weights, and the passes that made them what they are."""

    info: ModelInfo
    weights: Weights
    symbols: Symbols
    graphs: dict[str, fx.Graph] = field(default_factory=dict)
    passes: list[PassRecord] = field(default_factory=list)

    @property
    def prefill(self) -> fx.Graph:
        """The graph from both streams to the next token's logits and each layer's keys and values."""
        return self.graphs["prefill"]

    def copy(self) -> Program:
        """A program that passes can edit while this one stays as it is; the weights themselves are shared."""
        weights = Weights()
        for name, value in self.weights.items():
            weights.put(name, value)
        graphs = {name: _copy_graph(graph) for name, graph in self.graphs.items()}
        return Program(self.info, weights, self.symbols, graphs, list(self.passes))

    def to_text(self, graph: str | None = None) -> str:
        """The readable, stable form; see `foveate.ir.text`."""
        from foveate.ir.text import program_to_text

        return program_to_text(self, graph)

    def __str__(self) -> str:
        return self.to_text()


def _copy_graph(graph: fx.Graph) -> fx.Graph:
    new = fx.Graph()
    memory: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        memory[node] = new.node_copy(node, memory.__getitem__)
    return new


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """Arguments of a node; what they are is up to the op, so they are not typed."""
    return node.args


def outputs(graph: fx.Graph) -> dict[str, Any]:
    """What a graph returns: name -> node, or nested lists of nodes."""
    value = graph.output_node().args[0]
    assert isinstance(value, dict)
    return value


def layer_kv(graph: fx.Graph) -> list[LayerKV]:
    """The `kv` output of a prefill graph, layer by layer."""
    result = []
    for entry in outputs(graph)["kv"]:
        k_visual, v_visual, k_text, v_text = entry
        visual = None if k_visual is None else (k_visual, v_visual)
        result.append(LayerKV(visual, (k_text, v_text)))
    return result
