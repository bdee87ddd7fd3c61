"""Packages for other runtimes: a saved folder, and its graphs as files beside the weights that all of them read.

    OUT/  foveate.json  program.txt  model.safetensors  config.json  generation_config.json     as `save_pretrained`
          vision_encoder.onnx   pixel_values -> image_features
          embed_tokens.onnx     input_ids -> inputs_embeds
          decoder_prefill.onnx  visual_embeds, text_embeds, ... -> logits, keep.{layer}, present.{i}.*, visual.{i}.*
          decoder_step.onnx     inputs_embeds, past_key_values.{i}.*, visual.{i}.*, ... -> logits, new.{i}.*
          and, for TensorRT, what `foveate.backends.tensorrt.prepare` writes
          serving/triton/, where it is asked for: see `foveate.serving.triton.repository`

For AOTInductor it is the saved folder alone: compiled code stays in the user's cache (`foveate.backends.aoti`).

The folder is written under a temporary name, checked by running it, and renamed: it is there whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate import artifact
from foveate.backends.base import Runner, lower
from foveate.backends.onnx.lowering import Seen, recorded
from foveate.errors import BackendError, InputError, ParityError
from foveate.ir.program import ModelInfo
from foveate.model import OptimizedModel
from foveate.models.registry import FAMILIES
from foveate.ops import PAD

BACKENDS = ("onnx", "tensorrt", "aoti")

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}
"""Largest difference of logits, as a share of the largest logit."""

KEPT = {torch.float16: 0.9, torch.bfloat16: 0.9}
"""Share of visual tokens that must stay in both where rounding decides near ties; else all must."""

Lowered = Callable[[], tuple[dict[str, Runner], str]]
"""Gives a runner for each graph, and in words how it runs them."""

NEW_TOKENS = 8
SEED = 0


@dataclass(frozen=True)
class Parity:
    """What running a package beside eager torch gave: prompts, largest difference of logits and what it may be.

    Both as shares of the largest logit; in half precision, of prompts of which the same visual tokens stay. kept:
    whether all of those do; shared: which share of them, and shared_least: what it must be; tokens: whether answers are
    equal; ran: in words, what ran the graphs.
    """

    prompts: int
    difference: float
    tolerance: float
    kept: bool
    tokens: bool
    shared: float = 1.0
    shared_least: float = 1.0
    ran: str = ""

    @property
    def near(self) -> bool:
        """Whether enough of the visual tokens that stay are the same."""
        return self.kept or (self.shared_least < 1 and self.shared >= self.shared_least)

    @property
    def ok(self) -> bool:
        """Whether the package computes what torch computes."""
        return self.difference <= self.tolerance and self.near

    def __str__(self) -> str:
        share = f"{self.shared:.1%} of the visual tokens that stay are the same ({self.shared_least:.0%} needed)"
        other = share if self.near else f"OTHER VISUAL TOKENS STAY: {share}"
        kept = "the same visual tokens stay" if self.kept else other
        answers = "the same answers" if self.tokens else "other answers"
        found = (
            f"{self.prompts} random prompts against eager: logits differ by {self.difference:.1e} of the largest at "
            f"most ({self.tolerance:.0e} allowed), {kept}, {answers} of {NEW_TOKENS} tokens"
        )
        return f"{found}\n{self.ran}" if self.ran else found


Range = tuple[int, int, int]
"""Least, likeliest and largest size."""

SIZES: dict[str, Range] = {
    "batch": (1, 1, 8),
    "images": (1, 1, 8),
    "text_tokens": (1, 64, 2048),
    "past_tokens": (1, 192, 4096),
    "tokens": (1, 64, 2048),
}
"""What TensorRT's profiles span if nothing else is said; visual tokens: one image to four."""


@dataclass(frozen=True)
class Exported:
    """What was written: folder, backend, bytes by file, and what checking it found (None where it was not checked).

    tensorrt: how far TensorRT got, where that was the backend (`foveate.backends.tensorrt.prepare.Status`). compiled:
    what compiling took, where it was AOTInductor (`foveate.backends.aoti.Built`). serving: what was written for a
    server, whose files are not in `bytes` (`foveate.serving.triton.Repository`).
    """

    folder: Path
    backend: str
    bytes: dict[str, int]
    parity: Parity | None
    tensorrt: Any = None
    compiled: Any = None
    serving: Any = None

    def __str__(self) -> str:
        total, weights = sum(self.bytes.values()), self.bytes["model.safetensors"]
        lines = [f"{self.folder}: {total / 2**20:.1f} MiB, {total / weights:.3f} times its weights"]
        lines.append(str(self.parity or "not checked against eager"))
        more = (self.tensorrt, self.compiled, self.serving)
        return "\n".join([*lines, *(str(each) for each in more if each is not None)])

    def to_json(self) -> dict[str, Any]:
        """As the command prints it."""
        parity = None if self.parity is None else {**asdict(self.parity), "ok": self.parity.ok}
        found = {"folder": str(self.folder), "backend": self.backend, "bytes": self.bytes, "parity": parity}
        more = {"tensorrt": self.tensorrt, "serving": self.serving}
        found |= {name: asdict(each) for name, each in more.items() if each is not None}
        return found if self.compiled is None else {**found, "compiled": self.compiled.to_json()}


def export(
    model: OptimizedModel,
    backend: str,
    folder: Path,
    verify: bool = True,
    sizes: Mapping[str, Range] | None = None,
    serving: str | None = None,
    opset: int | None = None,
    plugin: bool = False,
) -> Exported:
    """See `foveate.export`."""
    if backend not in BACKENDS:
        raise BackendError(f"foveate exports to {', '.join(BACKENDS)}, not to {backend!r}")
    if sizes and backend != "tensorrt":
        raise BackendError("sizes are those of TensorRT's profiles; graphs for ONNX Runtime take any")
    if serving is not None and (serving, backend) != ("triton", "onnx"):
        raise BackendError(f"for serving there is triton, over the backend onnx; not {serving} over {backend}")
    if opset is not None and backend == "aoti":
        raise BackendError("an opset is one of ONNX graphs, which AOTInductor does not compile")
    if plugin and backend != "tensorrt":
        raise BackendError(f"the plugin is TensorRT's: export with the backend tensorrt, not {backend}")
    with artifact.new_folder(folder) as work:
        artifact.write_model(model, work)
        if backend == "aoti":
            lowered, compiled = _compile(model, work)
        else:
            lowered, compiled = _write(model, work, backend, opset, plugin), None
        parity = None
        if verify:
            runners, ran = lowered()
            runs_by = "aoti" if backend == "aoti" else "onnx"
            parity = replace(check(model, _as(model, runs_by, lambda: runners)), ran=ran)
        if parity is not None and not parity.ok:
            raise ParityError(f"the exported graphs do not agree with torch, so nothing was written: {parity}")
        exported = Exported(folder, backend, {}, parity, compiled=compiled)
        if backend == "tensorrt":
            status = prepare_tensorrt(model, work, sizes or {})
            artifact.mark_tensorrt(work, status.status, status.missing)
            exported = replace(exported, tensorrt=status)
        if serving is not None:
            from foveate.serving.triton import write

            exported = replace(exported, serving=write(model, work))
        files = [path for path in sorted(work.rglob("*")) if path.is_file() and work / "serving" not in path.parents]
        sizes_of = {str(path.relative_to(work)): path.stat().st_size for path in files}
    return replace(exported, bytes=sizes_of)


def _write(model: OptimizedModel, work: Path, backend: str, opset: int | None, plugin: bool) -> Lowered:
    """Write ONNX files into a folder that holds the weights; what opens them."""
    try:
        from foveate.backends.onnx.checking import open_checked
        from foveate.backends.onnx.graphs import BLOCKS
        from foveate.backends.onnx.opsets import checked
        from foveate.backends.onnx.package import write_graphs
    except ImportError:
        raise BackendError(
            "exporting to ONNX needs the packages of foveate[onnx]: pip install 'foveate[onnx]'"
        ) from None
    # TensorRT has attention kernels of its own, which skip what a mask hides or do not mind.
    blocks = 1 if backend == "tensorrt" else BLOCKS
    number = checked(opset, model.program.dtype)
    artifact.add_graphs(work, write_graphs(model.program, work, blocks, number, plugin), model, number)
    return lambda: open_checked(model.program, work)


def _compile(model: OptimizedModel, work: Path) -> tuple[Lowered, Any]:
    """Compile the graphs into the user's cache; what gives them, and what it took."""
    from foveate.backends.aoti import build

    runners, built = build(model.program)
    artifact.mark_compiled(work)
    return lambda: (runners, "run as compiled by AOTInductor"), built


def _as(model: OptimizedModel, backend: str, lowered: Callable[[], dict[str, Runner]]) -> OptimizedModel:
    return OptimizedModel(model.program, model.config, model.generation_config, backend, lowered)


def prepare_tensorrt(model: OptimizedModel, folder: Path, sizes: Mapping[str, Range]) -> Any:
    """Prepare a package for TensorRT, with eager torch's answer to a random prompt as reference; build it, maybe."""
    from foveate.backends.onnx.names import FILES
    from foveate.backends.tensorrt.prepare import axes, prepare

    program, free = model.program, axes(folder)
    spans = {name: span for name, span in ranges(model, sizes).items() if name in free}
    seen: Seen = {}
    if program.dtype == torch.bfloat16:  # numpy, and so Polygraphy's JSON, has no such type
        return prepare(folder, spans)
    eager = _as(model, "eager", lambda: recorded(program, lower(program, "eager"), seen))
    inputs = prompts(program.info, len(program.weights.get(program.info.paths["embed"])), (1,), 0)
    with torch.inference_mode():
        eager.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    references = {FILES[name].removesuffix(".onnx"): arrays for name, arrays in seen.items()}
    return prepare(folder, spans, references)


def ranges(model: OptimizedModel, sizes: Mapping[str, Range]) -> dict[str, Range]:
    """The sizes of every symbolic axis of a package: those given, else `SIZES`, and those that follow from them."""
    from foveate.backends.onnx.names import axis_name

    program, left = model.program, model.program.tokens_left
    base: dict[str, Range] = {**SIZES, "visual_tokens": (left, left, 4 * left), "kept_tokens": (1, left, left)}
    least, likely, most = (size * program.info.patches_per_token for size in base["visual_tokens"])
    base["patches"] = least, likely, most
    for name in sizes:
        if name not in base:
            raise InputError(f"no graph has an axis {name!r} whose size is free; there are: {', '.join(base)}")
    base |= sizes
    names = program.symbols.names()
    free = [{symbol: base[name][i] for symbol, name in names.items() if name in base} for i in range(3)]
    found: dict[str, Range] = {"tokens": base["tokens"]}
    given = [n.meta["val"] for graph in program.graphs.values() for n in graph.nodes if n.op == "placeholder"]
    for size in (size for value in given if isinstance(value, Tensor) for size in value.shape):
        if isinstance(size, torch.SymInt):
            least, likely, most = (int(size.node.expr.subs(sizes)) for sizes in free)
            found[axis_name(size, names)] = least, likely, most
    return found


def check(model: OptimizedModel, packaged: OptimizedModel) -> Parity:
    """Run random prompts by a model as it was exported and by eager torch."""
    program = model.program
    if any(n.name == "questions" for n in program.graphs["vision"].nodes):
        raise BackendError("a model that chooses by the question cannot be checked on random prompts: verify=False")
    eager = OptimizedModel(program, model.config, model.generation_config)
    allowed, least = TOLERANCE[program.dtype], KEPT.get(program.dtype, 1.0)
    found = []
    pairs: list[tuple[Tensor, Tensor]] = []
    for number, counts in enumerate(((1,), (2, 0, 1), (0,))):
        inputs = prompts(program.info, int(program.weights.get(program.info.paths["embed"]).shape[0]), counts, number)
        with torch.inference_mode():
            a, b = eager(**inputs), packaged(**inputs)
            answers = [
                each.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False) for each in (eager, packaged)
            ]
        stay = [(places, b.kept[layer]) for layer, places in (a.kept or {}).items()]
        pairs += stay
        off = (a.logits.float() - b.logits.float()).abs().amax((1, 2)) / max(float(a.logits.abs().max()), 1e-9)
        if least < 1:  # A prompt of which other tokens stay has other logits.
            alike = [_equal_rows(*each) for each in stay]
            off = off[torch.tensor([all(row) for row in zip(*alike, strict=True)])] if alike else off
        difference = float(off.max()) if len(off) else 0.0
        found.append((difference, all(torch.equal(*each) for each in stay), torch.equal(*answers)))
    differences, kept_all, same = zip(*found, strict=True)
    most = float(torch.tensor(differences).max())  # which is NaN where one is
    return Parity(len(found), most, allowed, all(kept_all), all(same), _shared(pairs), least)


def _equal_rows(a: Tensor, b: Tensor) -> list[bool]:
    return [x == y for x, y in zip(a.tolist(), b.tolist(), strict=True)]


def _shared(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Which share of places [B, k] is in the other of a pair too, row by row; padding does not count."""
    rows = [(set(a) - {PAD}, set(b)) for pair in pairs for a, b in zip(*(x.tolist() for x in pair), strict=True)]
    total = sum(len(a) for a, _ in rows)
    return sum(len(a & b) for a, b in rows) / total if total else 1.0


def prompts(info: ModelInfo, vocabulary: int, counts: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    """A batch of random prompts, a row for each number of images, padded on the left."""
    generator = torch.Generator().manual_seed(SEED + seed)
    sizes, given = FAMILIES[info.family].sample(info, sum(counts), generator)
    left, rows = iter(sizes), []
    for number, images in enumerate(counts):
        text = torch.randint(0, vocabulary, (7 + 3 * images + number,), generator=generator)
        while bool(info.visual(text).any()):
            text = torch.where(info.visual(text), (text + 1) % vocabulary, text)
        parts = [text[:2]]
        for image in range(images):
            parts += [torch.full((next(left),), info.image_token_id), text[2 + image : 3 + image]]
        rows.append(torch.cat([*parts, text[2 + images :]]))
    width = max(map(len, rows))
    pads = [width - len(row) for row in rows]
    ids = torch.stack([torch.nn.functional.pad(row, (pad, 0)) for row, pad in zip(rows, pads, strict=True)])
    mask = torch.stack([torch.arange(width) >= pad for pad in pads]).long()
    return {"input_ids": ids, "attention_mask": mask, **given}
