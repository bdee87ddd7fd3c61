"""How published tables count, so that their figures can be set beside what the graphs really run.

Each convention gives the work of a program's `vision` and `prefill` as its paper would; what it leaves alone stays
as `actual` has it. All count a layer whole, also the last one, whose visual output nobody reads.

- `yopo` (arXiv 2410.06169): FLOPs of visual tokens in the language model: linears, and dense non-causal attention
  among visual tokens. No text, no vision tower, no head. Bytes and time stay those of `actual`.
- `lvpruning` (arXiv 2501.13652): FLOPs of linears alone: the vision tower to its full depth, projector, all tokens
  in the language model, the head on every token left; and decision modules, those in the graph or, where it has
  none, those that `modules` names. Bytes and time stay those of `actual`.
- `llm-viewer` (arXiv 2402.16363, used by arXiv 2409.01162): the language model's prefill with its own roofline and
  byte counts: attention scores are written and read (no fused kernel), the head runs for one token and counts a
  multiply-add once. The vision tower counts nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from foveate.errors import InputError
from foveate.ir.cost.devices import Device
from foveate.ir.cost.shapes import LayerShape, layer_shapes
from foveate.ir.cost.sizes import Precision, Sizes
from foveate.ir.cost.work import Work, node_flops
from foveate.ir.modules import MODULE
from foveate.ir.program import Program, info
from foveate.ir.rewriter import nodes_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Request:
    """What a convention counts: a program at given sizes; modules: layers with a decision module before them."""

    program: Program
    sizes: Sizes
    precision: Precision
    device: Device
    modules: tuple[int, ...] = ()

    @property
    def text(self) -> int:
        """Text tokens of a row."""
        return self.sizes.names["text_tokens"]

    @property
    def batch(self) -> int:
        """Rows."""
        return self.sizes.names["batch"]

    @property
    def vocabulary(self) -> int:
        """Rows of the head."""
        return int(self.program.weights.get(self.program.info.paths["head"]).shape[0])

    def layers(self) -> list[LayerShape]:
        """What is left of each layer for visual tokens."""
        return layer_shapes(self.program, self.sizes)


def yopo(request: Request) -> dict[str, Work]:
    """methods.md section 7.1: F = sum over layers of 2 N (projections + FFN) + 4 N^2 e h."""
    about = request.program.info
    total = 0
    for shape in request.layers():
        projections = 2 * about.hidden_size * about.head_dim * (shape.heads + shape.kv_heads)
        ffn = 3 * about.hidden_size * shape.neurons
        total += 2 * shape.tokens * (projections + ffn) + 4 * shape.tokens**2 * about.head_dim * shape.heads
    return {"vision": Work(), "prefill": Work(flops=request.batch * total)}


def lvpruning(request: Request) -> dict[str, Work]:
    """methods.md section 7.2: 2 FLOPs a weight and token, attention products left out."""
    about, layers = request.program.info, request.layers()
    d, whole = about.hidden_size, LayerShape(0, about.heads, about.kv_heads, about.intermediate_size)
    total = 0
    for shape in layers:
        for tokens, width in ((shape.tokens, shape), (request.text, whole)):
            total += 2 * tokens * (2 * d * about.head_dim * (width.heads + width.kv_heads) + 3 * d * width.neurons)
    total += 2 * (request.text + layers[-1].tokens) * d * request.vocabulary
    for layer in request.modules:
        if not 0 <= layer < len(layers):
            raise InputError(f"modules: layer {layer} is not one of this model's {len(layers)}")
        entering = layers[max(layer - 1, 0)].tokens if layer else request.sizes.names["visual_tokens"]
        # Two cross-attention blocks: queries, output and a 2x FFN for each visual token, keys and values for text.
        total += 2 * 2 * d * d * (6 * entering + 2 * request.text)
    found = _module_linears(request)
    if found and request.modules:
        raise InputError("modules: the program has modules, which are counted; leave the option out")
    return {"vision": Work(flops=_tower_linears(request)), "prefill": Work(flops=request.batch * total + found)}


def _module_linears(request: Request) -> int:
    """Linears of the modules that are in the graph, without the two logits of a token, which the paper leaves out."""
    linears = nodes_of(request.program.prefill, role=MODULE, op=aten.linear.default)
    return sum(node_flops(n, request.sizes, request.device)[0] for n in linears if request.sizes.shape(n)[-1] > 2)


def _tower_linears(request: Request) -> int:
    """Linears and convolutions of the tower, as if those of its layers that nothing reads ran too."""
    by_layer: dict[int, int] = {}
    for node in (n for graph in request.program.tower.values() for n in graph.nodes):
        if node.target in (aten.linear.default, aten.conv2d.default):
            layer = info(node).layer
            by_layer[layer] = by_layer.get(layer, 0) + node_flops(node, request.sizes, request.device)[0]
    last = max(by_layer)
    tower = [flops for layer, flops in by_layer.items() if 0 <= layer < last]
    vision = request.program.info.config.get("vision_config", {})
    depth = vision.get("num_hidden_layers") or vision.get("depth") or len(tower)
    around = by_layer.get(-1, 0) + by_layer[last]
    return around + (sum(tower) + tower[-1] * (int(depth) - len(tower)) if tower else 0)


@dataclass(frozen=True)
class _Op:
    """One op of LLM-Viewer's: operations, and elements of weights, activations read and written, and cache moved."""

    flops: int
    weights: int = 0
    loaded: int = 0
    stored: int = 0
    kv: int = 0


def llm_viewer(request: Request) -> dict[str, Work]:
    """methods.md section 7.3: every op takes max(OPs / peak, bytes / bandwidth)."""
    precision, device, batch = request.precision, request.device, request.batch
    total = Work()
    for op in _llm_viewer_ops(request):
        weight_bytes = op.weights * precision.weight_bits // 8
        kv_bytes = batch * op.kv * precision.kv_bits // 8
        read, written = (batch * count * precision.bits // 8 for count in (op.loaded, op.stored))
        compute = batch * op.flops / device.rate(precision.dtype)
        memory = (weight_bytes + kv_bytes + read + written) / device.bytes_per_s
        bound = {"compute_s": compute} if compute >= memory else {"memory_s": memory}
        time = max(compute, memory)
        total += Work(batch * op.flops, weight_bytes, read + written, kv_bytes, written, time, **bound)
    return {"vision": Work(), "prefill": total}


def _llm_viewer_ops(request: Request) -> Iterator[_Op]:
    about, text = request.program.info, request.text
    d, e, v = about.hidden_size, about.head_dim, request.vocabulary
    full = LayerShape(text, about.heads, about.kv_heads, about.intermediate_size)
    for shape in request.layers():
        streams, n = (shape, full), shape.tokens + text
        wide = [(s.tokens, d) for s in streams]
        queries = [(s.tokens, s.heads * e) for s in streams]
        keys = [(s.tokens, s.kv_heads * e) for s in streams]
        neurons = [(s.tokens, s.neurons) for s in streams]
        yield _linear(wide, queries)
        yield from (_linear(wide, keys, cached=True) for _ in "kv")
        yield _linear(queries, wide)
        yield from (_linear(wide, neurons) for _ in ("gate", "up"))
        yield _linear(neurons, wide)
        # A dropped head pairs text with text alone.
        pairs = shape.heads * n * n + (full.heads - shape.heads) * text * text
        yield _Op(2 * e * pairs, loaded=_count(keys), stored=pairs, kv=_count(keys))
        yield _Op(2 * e * pairs, loaded=pairs, stored=_count(queries), kv=_count(keys))
        yield _Op(5 * pairs, loaded=pairs, stored=pairs)
        yield from (_Op(7 * d * n, loaded=d * n, stored=d * n) for _ in ("norm", "norm"))
        yield from (_Op(d * n, loaded=d * n, stored=d * n) for _ in ("add", "add"))
        yield _Op(2 * d * n, loaded=2 * d * n, stored=d * n)
    yield _Op(d * v, weights=d * v, loaded=d, stored=v)


Widths = list[tuple[int, int]]
"""(tokens, width) of the visual and of the text stream."""


def _count(widths: Widths) -> int:
    return sum(tokens * width for tokens, width in widths)


def _linear(inputs: Widths, outputs: Widths, cached: bool = False) -> _Op:
    """Both streams through one weight, whose first rows and columns are all that visual tokens use."""
    flops = sum(2 * tokens * i * o for (tokens, i), (_, o) in zip(inputs, outputs, strict=True))
    stored = _count(outputs)
    weights = inputs[1][1] * outputs[1][1]
    return _Op(flops, weights, _count(inputs), 0 if cached else stored, stored if cached else 0)


CONVENTIONS: dict[str, Callable[[Request], dict[str, Work]]] = {
    "yopo": yopo,
    "lvpruning": lvpruning,
    "llm-viewer": llm_viewer,
}
"""Published conventions by name."""

TIMED = {"llm-viewer"}
"""Those that count bytes and time too; the others count FLOPs alone."""
