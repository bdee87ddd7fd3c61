"""What a traced model is: named FX graphs over one set of weights, and what each node is there for.

Every node carries a `NodeInfo` in `node.meta["foveate"]` and a fake value with symbolic sizes in `node.meta["val"]`;
`foveate.ir.symbols` makes the sizes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from foveate.ir.symbols import Symbols as Symbols  # a part of a program, so it is found here too

Stream = Literal["visual", "text", "joint", "none"]
TOWER = ("vision", "vision_rest")
"""Graphs from pixels to visual embeddings; the second one is there where a pass cuts the tower in two."""


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


TowerKind = Literal["patches", "squares", "interleaved", "packed", "shrunk", "unknown"]
"""How a vision tower makes an image's tokens.

patches: a token of each patch, behind a CLS token. squares: a token of each square of patches, or of each patch, behind
a CLS token or not, all images of one size. interleaved: as patches, but rows of several tiles stand side by side, with
newlines between. packed: all images, of any size, stand in one sequence. shrunk: images and frames become smaller
behind the tower, which has no CLS token.
"""


@dataclass(frozen=True)
class ModelInfo:
    """What passes and the runtime need to know of a model: sizes, token ids, and where its weights are.

    paths: full weight names by short name: `embed` (token embedding) and so on. roles: what the family calls the
    linears of a decoder layer: q, k, v, o, gate, up, down. grid: rows and columns of an image's visual tokens.
    config: the Hugging Face configuration as a plain dictionary. patches_per_token: vision patches that become one
    visual token, where the tower takes a batch's patches in one packed sequence. video_token_id: what stands for a
    video's tokens in a prompt, in families that take videos. patches_per_window: of a whole window, where the tower's
    attention has windows. deepstack: behind how many of the first layers visual tokens get features of their own added.
    embed_scale: what token embeddings are multiplied by. norm_offset: what the decoder's norms add to their weights.
    uniform: whether every image, or tile, becomes as many tokens as `grid` has, row by row and in one piece.
    tower: how the tower makes tokens, as far as passes that select inside it know it.
    position_limit: positions that a prompt and its answer may take, where frequencies of rotary embeddings change
    beyond.
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
    patches_per_token: int = 1
    video_token_id: int | None = None
    patches_per_window: int = 0
    deepstack: int = 0
    embed_scale: float = 1.0
    norm_offset: float = 0.0
    uniform: bool = True
    tower: TowerKind = "unknown"
    position_limit: int | None = None

    @property
    def tokens_per_image(self) -> int:
        """Visual tokens that one image becomes."""
        return self.grid[0] * self.grid[1]

    def visual(self, ids: Tensor) -> Tensor:
        """Where tokens of an image or a video stand in ids: bool, of the same shape."""
        image = ids == self.image_token_id
        return image if self.video_token_id is None else image | (ids == self.video_token_id)


@dataclass(frozen=True)
class Holder:
    """A module that holds weights: its path, and where it hangs."""

    path: str
    parent: nn.Module
    leaf: str
    module: nn.Module

    @property
    def replaced(self) -> bool:
        """Whether another module stands in its place by now."""
        return self.parent._modules.get(self.leaf) is not self.module


class Weights(nn.Module):
    """All weights of a program under their Hugging Face names, each stored once; graphs refer to them by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, None] = {}

    @classmethod
    def of(cls, named: Iterable[tuple[str, Tensor]]) -> Weights:
        """These weights, in this order."""
        weights = cls()
        for name, value in named:
            weights.put(name, value)
        return weights

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

    def as_linears(self, names: Iterable[str]) -> None:
        """Let the modules that hold these matrices be `nn.Linear`, which is what adapters look for and replace."""
        for name in names:
            path = name.rpartition(".")[0]
            held = {each: self.get(each) for each in (name, f"{path}.bias") if each in self.names}
            rows, columns = held[name].shape
            self.set_submodule(path, nn.Linear(columns, rows, len(held) > 1, device="meta"))
            for each, value in held.items():
                self.put(each, value)

    def holders(self) -> list[Holder]:
        """The modules that hold weights; one is replaced when an adapter is put there."""
        paths = dict.fromkeys(name.rpartition(".")[0] for name in self.names)
        ends = [(path, *path.rpartition(".")[::2]) for path in paths]
        return [Holder(path, self.get_submodule(parent), leaf, self.get_submodule(path)) for path, parent, leaf in ends]

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

    `visual` is None where no later text looks at visual tokens. `held` is what a prefill leaves of both, one block,
    where keys are evicted (`foveate.ir.kv`).
    """

    visual: tuple[fx.Node, fx.Node] | None
    text: tuple[fx.Node, fx.Node]
    held: tuple[fx.Node, fx.Node] | None = None


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to a program: its text, notes for the reader, edits by kind, or why it changed nothing.

    cost: before and after, at one image and 60 text tokens: `prefill_flops`, `kv_bytes`, and `prefill_s`, seconds as
    predicted for `device`.
    """

    text: str
    notes: tuple[str, ...] = ()
    edits: dict[str, int] = field(default_factory=dict)
    skipped: str | None = None
    cost: dict[str, tuple[float, float]] | None = None
    device: str = ""


@dataclass
class Program:
    """Graphs by name, their weights, and the passes that made them what they are.

    `vision`, `prefill` and `decode`; where the number of tokens inside the tower depends on the image, `vision` ends
    with the choice and `vision_rest` goes on with as many as are left (`foveate.ir.tower_layers`).
    """

    info: ModelInfo
    weights: Weights
    symbols: Symbols
    graphs: dict[str, fx.Graph] = field(default_factory=dict)
    passes: list[PassRecord] = field(default_factory=list)

    @property
    def prefill(self) -> fx.Graph:
        """The graph from both streams to the next token's logits and each layer's keys and values."""
        return self.graphs["prefill"]

    @property
    def shortens(self) -> bool:
        """Whether the vision graph makes fewer visual tokens of an image than the prompt has for it."""
        return not outputs(self.graphs["vision"]).keys().isdisjoint(("source", "stays"))

    @property
    def depends_on_image(self) -> bool:
        """Whether the number of visual tokens that the vision graph leaves of an image depends on that image."""
        return "count" in outputs(self.graphs["vision"])

    @property
    def tokens_left(self) -> int:
        """How many visual tokens the vision graph makes of an image, at most."""
        if not self.shortens:
            return self.info.tokens_per_image
        found = outputs(self.graphs["vision"])
        if "stays" in found:
            keep: float = args_of(found["stays"])[5]
            return int(keep * self.info.tokens_per_image)
        source: Tensor = found["source"].meta["val"]
        return int(source.shape[1])

    @property
    def tower(self) -> dict[str, fx.Graph]:
        """The graphs from pixels to visual embeddings, in the order in which they run."""
        return {name: self.graphs[name] for name in TOWER if name in self.graphs}

    @property
    def dtype(self) -> torch.dtype:
        """Of the token embedding, which is that of the weights."""
        return self.weights.get(self.info.paths["embed"]).dtype

    def used_weights(self) -> set[str]:
        """Names of the weights that the graphs read, and of the token embedding; a model may hold more."""
        read = {str(n.target) for graph in self.graphs.values() for n in graph.nodes if n.op == "get_attr"}
        return {*read, self.info.paths["embed"]}

    def forget_unused(self) -> None:
        """Let go of weights that no graph reads, such as those of a vision tower's last layer."""
        used = self.used_weights()
        self.weights = Weights.of((name, value) for name, value in self.weights.items() if name in used)

    def copy(self) -> Program:
        """A program that passes can edit while this one stays as it is; the weights themselves are shared."""
        weights = Weights.of(self.weights.items())
        graphs = {name: copy_graph(graph) for name, graph in self.graphs.items()}
        return Program(self.info, weights, self.symbols, graphs, list(self.passes))

    def to_text(self, graph: str | None = None) -> str:
        """The readable, stable form; see `foveate.ir.text`."""
        from foveate.ir.text import program_to_text

        return program_to_text(self, graph)

    def __str__(self) -> str:
        return self.to_text()


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A graph of its own with the same nodes, names and meta data."""
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
    """The `kv` output of a decoder graph, layer by layer: [k, v] of visual and of text, or of a block and None."""
    result = []
    for entry in outputs(graph)["kv"]:
        k_visual, v_visual, k_text, v_text = entry
        if k_text is None:
            pairs = list(zip(args_of(k_visual)[0], args_of(v_visual)[0], strict=True))
            result.append(LayerKV(pairs[0] if len(pairs) > 1 else None, pairs[-1], (k_visual, v_visual)))
            continue
        visual = None if k_visual is None else (k_visual, v_visual)
        result.append(LayerKV(visual, (k_text, v_text)))
    return result
