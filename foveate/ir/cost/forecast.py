"""What a program costs, read off its graphs: FLOPs, bytes moved, key/value bytes, and a roofline forecast.

Symbolic shapes make sizes arguments: one trace answers for any number of tokens, on the `meta` device too. Each op
takes the longer of its arithmetic and its memory traffic on a device; see `foveate.ir.cost.work` for what is counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from foveate import ops
from foveate.errors import InputError
from foveate.ir.cost.conventions import CONVENTIONS, TIMED, Request
from foveate.ir.cost.devices import Device, device_of
from foveate.ir.cost.sizes import Precision, Sizes
from foveate.ir.cost.work import VIEWS, Meter, Work, base_of
from foveate.ir.join import join
from foveate.ir.kv import evicts_in_steps, held_names
from foveate.ir.program import LayerKV, Program, args_of, info, layer_kv

BY = ("layer", "role", "stream")


@dataclass(frozen=True)
class Cost:
    """One prompt batch: `vision` and `prefill` once, `decode` a generated token; bytes of cache and at the peak."""

    vision: Work
    prefill: Work
    decode: Work
    kv_bytes: int
    peak_bytes: int
    parameters: int

    @property
    def first_token_s(self) -> float:
        """Predicted seconds from pixels and prompt to the first token."""
        return self.vision.time_s + self.prefill.time_s

    @property
    def first_token_flops(self) -> int:
        """FLOPs from pixels and prompt to the first token."""
        return self.vision.flops + self.prefill.flops

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        graphs = {name: getattr(self, name).to_json() for name in ("vision", "prefill", "decode")}
        return {
            **graphs,
            "kv_bytes": self.kv_bytes,
            "peak_bytes": self.peak_bytes,
            "parameters": self.parameters,
            "first_token_s": self.first_token_s,
            "first_token_flops": self.first_token_flops,
        }


@dataclass(frozen=True)
class Part:
    """The work of one graph that shares a layer, role and stream; what was not asked for is None."""

    layer: int | None = None
    role: str | None = None
    stream: str | None = None
    work: Work = field(default_factory=Work)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        named = {name: getattr(self, name) for name in BY if getattr(self, name) is not None}
        return {**named, **self.work.to_json()}


def cost_of(program: Program, *, convention: str = "actual", modules: Sequence[int] = (), **sizes: Any) -> Cost:
    """The cost of one batch. Sizes and devices are those of `Forecast.of`.

    convention: `actual`, what the graphs run; `yopo`, `lvpruning` or `llm-viewer`, what those papers count (see
    `foveate.ir.cost.conventions`). modules: with `lvpruning`, the layers before which a decision module stands.
    Raises InputError for sizes below what a prompt needs, an unknown device, number format or convention.
    """
    return Forecast.of(program, **sizes).cost(convention, modules)


def breakdown(program: Program, by: Sequence[str] = ("layer",), **sizes: Any) -> dict[str, list[Part]]:
    """The `actual` cost of each graph in parts that share what `by` names: `layer`, `role`, `stream`, or several.

    By stream, what runs for both streams in one op is shared out by their numbers of tokens. Parts stand in the
    order in which their graph comes to them.
    """
    return Forecast.of(program, **sizes).parts(by)


class Forecast:
    """A program at given sizes and number formats on a device."""

    def __init__(
        self,
        program: Program,
        sizes: tuple[Sizes, Sizes, Sizes],
        counted: dict[str, int],
        precision: Precision,
        device: Device,
        joined: fx.Graph,
    ) -> None:
        self.program, self.precision, self.device, self.joined = program, precision, device, joined
        self.first, self.step, self.last = sizes
        self.counted = counted
        self.graphs: dict[str, tuple[tuple[fx.Graph, ...], Sizes]] = {
            "vision": (tuple(program.tower.values()), self.first),
            "prefill": ((joined,), self.first),
            "decode": ((program.graphs["decode"],), self.step),
        }

    @classmethod
    def of(
        cls,
        program: Program,
        *,
        visual_tokens: int | None = None,
        text_tokens: int = 60,
        batch: int = 1,
        images: int = 1,
        prefix_tokens: int | None = None,
        new_tokens: int = 0,
        past_tokens: int | None = None,
        device: Device | str = "cpu",
        dtype: str | None = None,
        weight_bits: int | None = None,
        kv_bits: int | None = None,
        joined: fx.Graph | None = None,
        kept_tokens: int | None = None,
    ) -> Forecast:
        """Sizes as arguments.

        visual_tokens: a row, all its images together, as the prompt has them (default: `images` whole images). images:
        a row. kept_tokens: those that the vision graph leaves of an image, where that depends on the image (default:
        as many as it may). prefix_tokens: text before the image (default: half of the text; several images have text
        between them). new_tokens: length of the answer: the cache holds it at the end, and the decode step counted is
        the middle one; past_tokens: text tokens in the cache at that step, where another one is wanted. device: a
        name, a YAML file, a `Device`.
        dtype: number format of activations and arithmetic (default: the program's); weight_bits, kv_bits: of weight
        matrices and of the cache (default: as wide as dtype). joined: the joined prefill graph, where another
        forecast of this program has made it.
        """
        about = program.info
        visual = images * about.tokens_per_image if visual_tokens is None else visual_tokens
        left = program.tokens_left if kept_tokens is None else kept_tokens
        patches = batch * visual * about.patches_per_token
        prefix = text_tokens // 2 if prefix_tokens is None else prefix_tokens
        past = text_tokens + new_tokens // 2 if past_tokens is None else past_tokens
        if text_tokens < 1 or batch < 1:
            raise InputError("sizes must be: text_tokens and batch 1 or more")
        if kept_tokens is not None and not program.depends_on_image:
            raise InputError("kept_tokens is for passes whose number of tokens depends on the image; there is none")
        if not 0 <= left <= program.tokens_left:
            raise InputError(f"kept_tokens must be 0 to {program.tokens_left}, it is {kept_tokens}")
        for name, value in (("images", images), ("visual_tokens", visual), ("past_tokens", past)):
            if value < 0:
                raise InputError(f"{name} must be 0 or more, it is {value}")
        if not 0 <= prefix <= text_tokens or new_tokens < 0:
            raise InputError("sizes must be: prefix_tokens 0 to text_tokens, new_tokens 0 or more")
        base = {
            "batch": batch,
            "images": batch * images,
            "visual_tokens": visual * left // about.tokens_per_image,
            "kept_tokens": left,
            "patches": patches,
            "windows": math.ceil(patches / about.patches_per_window) if about.patches_per_window else 0,
            # Text between several images leaves attention no structure to use.
            "prefix": prefix if images <= 1 else -1,
        }
        first = Sizes(program, {**base, "text_tokens": text_tokens})
        cached = cached_tokens(program, first, past)
        return cls(
            program,
            sizes=(
                first,
                Sizes(program, {**base, "text_tokens": 1, **cached}),
                Sizes(program, {**base, "text_tokens": text_tokens + new_tokens}),
            ),
            counted={"visual_tokens": visual, "text_tokens": text_tokens, "batch": batch},
            precision=Precision.of(program, dtype, weight_bits, kv_bits),
            device=device_of(device),
            # As a backend would on such a device.
            joined=joined or join(program, program.prefill, share=device_of(device).kind != "cpu"),
        )

    def cost(self, convention: str = "actual", modules: Sequence[int] = ()) -> Cost:
        """All of it, counted as `cost_of` says."""
        if convention not in ("actual", *CONVENTIONS):
            raise InputError(f"convention {convention!r} is not known; there are: actual, {', '.join(CONVENTIONS)}")
        if modules and convention != "lvpruning":
            raise InputError("decision modules are counted by the convention lvpruning only")
        actual = self._actual()
        if convention == "actual":
            return actual
        request = Request(self.program, self.first, self.precision, self.device, tuple(modules))
        counted = CONVENTIONS[convention](request)
        if convention not in TIMED:
            counted = {name: replace(getattr(actual, name), flops=work.flops) for name, work in counted.items()}
        return replace(actual, vision=counted["vision"], prefill=counted["prefill"])

    def _actual(self) -> Cost:
        used = self.program.used_weights()
        weights = [w for name, w in self.program.weights.items() if name in used]
        cache = self.kv_bytes()
        peak = max(cache, *(self.peak_bytes(name) for name in ("vision", "prefill")))
        return Cost(
            **{name: self.work(name) for name in self.graphs},
            kv_bytes=cache,
            peak_bytes=peak + sum(w.numel() * self.precision.bits_of(w, "weight") // 8 for w in weights),
            parameters=sum(w.numel() for w in weights if w.is_floating_point()),
        )

    def work(self, name: str) -> Work:
        """All that a graph runs, as it runs it."""
        return sum((meter.of(node) for meter, graph in self._metered(name) for node in graph.nodes), Work())

    def parts(self, by: Sequence[str]) -> dict[str, list[Part]]:
        """See `breakdown`."""
        unknown = [name for name in by if name not in BY]
        if unknown or not by:
            raise InputError(f"a breakdown is by {', '.join(BY)}, or several of them; got {', '.join(by) or 'nothing'}")
        result = {}
        for name, (_, sizes) in self.graphs.items():
            blind = Sizes(self.program, {**sizes.names, "text_tokens": 0})
            found: dict[Part, Work] = {}
            for meter, node in ((meter, n) for meter, graph in self._metered(name) for n in graph.nodes):
                if node.op != "call_function" or node.target in VIEWS:
                    continue
                about, work = info(node), meter.of(node)
                shares = _shares(node, sizes, blind) if "stream" in by else {about.stream: 1.0}
                for stream, share in shares.items():
                    named: dict[str, Any] = {"layer": about.layer, "role": about.role, "stream": stream}
                    key = Part(**{b: value for b, value in named.items() if b in by})
                    found[key] = found.get(key, Work()) + (work if share == 1 else work.share(share))
            result[name] = [replace(part, work=work) for part, work in found.items()]
        return result

    def kv_bytes(self) -> int:
        """Bytes of all layers' keys and values after the whole answer."""
        total = 0
        for layer in layer_kv(self.program.prefill):
            if layer.held:
                answer = self.last.names["text_tokens"] - self.first.names["text_tokens"]
                held = held_tokens(layer, self.first, answer)
                total += sum(b * h * held * e for b, h, _, e in map(self.first.shape, layer.held))
            else:
                total += sum(self.last.numel(n) for n in (*layer.text, *(layer.visual or ())))
        return total * self.precision.kv_bits // 8

    def peak_bytes(self, name: str) -> int:
        """Most bytes of values alive at once in a run, each freed after its last use; weights not counted."""
        return max(self._peak_bytes(meter, graph) for meter, graph in self._metered(name))

    def _metered(self, name: str) -> list[tuple[Meter, fx.Graph]]:
        graphs, sizes = self.graphs[name]
        return [(Meter(graph, sizes, self.precision, self.device), graph) for graph in graphs]

    def _peak_bytes(self, meter: Meter, graph: fx.Graph) -> int:
        last = {base_of(n): node for node in graph.nodes for n in node.all_input_nodes}
        dying: dict[fx.Node, list[fx.Node]] = {}
        for value, reader in last.items():
            dying.setdefault(reader, []).append(value)
        alive = peak = 0
        for node in graph.nodes:
            if node.op in ("placeholder", "call_function") and node.target not in VIEWS:
                alive += meter.nbytes(node)
            peak = max(peak, alive)
            alive -= sum(meter.nbytes(n) for n in dying.get(node, ()) if n.op != "get_attr" and n.target not in VIEWS)
        return peak


def held_tokens(layer: LayerKV, prompt: Sizes, answer: int) -> int:
    """Tokens in the cache of a layer whose keys are evicted, `answer` tokens behind the prompt."""
    assert layer.held is not None  # such layers only are asked for
    chosen = args_of(args_of(layer.held[0])[1])[0]
    held = prompt.shape(layer.held[0])[2]
    if not evicts_in_steps(layer):
        return held + answer
    sums, _, heavy, recent = args_of(chosen)
    tokens = prompt.shape(sums)[2]
    return min(tokens + answer, int(ops.heavy_recent_count(tokens, heavy, recent)))


def cached_tokens(program: Program, prompt: Sizes, past: int) -> dict[str, int]:
    """Sizes of the cache when a decode step has `past` text tokens behind it; prompt: the sizes at the prefill."""
    names, layers = held_names(program.prefill), layer_kv(program.prefill)
    if not names:
        return {"past_tokens": past}
    answer = max(0, past - prompt.names["text_tokens"])
    held = {
        name: held_tokens(layers[n], prompt, answer if evicts_in_steps(layers[n]) else 0) for n, name in names.items()
    }
    return {**held, "past_tokens": answer}


def _shares(node: fx.Node, sizes: Sizes, blind: Sizes) -> dict[str, float]:
    """Of a node for both streams, what goes to each: what is left of its value without text is visual."""
    stream = info(node).stream
    whole = sizes.numel(node)
    if stream != "joint" or not whole:
        return {stream: 1.0}
    visual = blind.numel(node) / whole
    return {"visual": visual, "text": 1 - visual}


def default_device(program: Program) -> str:
    """The device that a report forecasts for when none is named: a GPU for half-precision weights, else the CPU."""
    return "h100" if program.dtype.itemsize <= 2 else "cpu"


def prefill_cost(program: Program) -> dict[str, float]:
    """What a pass changes, at one image and 60 text tokens: `prefill_flops`, `prefill_s` and `kv_bytes`."""
    forecast = Forecast.of(program, device=default_device(program))
    work = forecast.work("prefill")
    return {"prefill_flops": work.flops, "prefill_s": work.time_s, "kv_bytes": forecast.kv_bytes()}
