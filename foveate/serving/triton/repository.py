"""Writes a Triton model repository into an exported package.

    OUT/serving/triton/  decoder_step/config.pbtxt         names, types and sizes, as the graph has them
                         decoder_step/1/model.onnx         the package's graph, and beside it, where ONNX Runtime wants
                         decoder_step/1/model.safetensors  external data, the package's weights: both are hard links
                         ...                               the same for every other graph
                         foveate/1/model.py                runs them token by token: `foveate.serving.triton.model`
                         foveate_stream/1/model.py         the same, a response a token

An ensemble has no loops, so a Python model drives the graphs. Files that cannot be linked are copied.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.artifact import prompts_of
from foveate.errors import BackendError
from foveate.model import OptimizedModel
from foveate.serving.triton.check import check
from foveate.serving.triton.config import Config, TensorSpec, of_graph
from foveate.serving.triton.files import FOLDER, place, record

WEIGHTS = "model.safetensors"
WHOLE, STREAM = "foveate", "foveate_stream"
INSTANCES = 2
"""Processes of each Python model, each of which answers one request at a time; Triton queues the others."""

TAKEN = {
    "visual_embeds",
    "text_embeds",
    "visual_position_ids",
    "text_position_ids",
    "visual_order",
    "text_order",
    "visual_coords",
}
"""Inputs of a prefill that the Python model makes."""


@dataclass(frozen=True)
class Repository:
    """What was written: the folder in the package, its models, and bytes.

    bytes: what it takes on disk besides what is linked. linked: what the links would take as copies. checked: whether
    Triton's own schema was there to hold the configurations to.
    """

    folder: str
    models: tuple[str, ...]
    bytes: int
    linked: int
    checked: bool

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:.1f} MiB more, and {self.linked / 2**20:.1f} MiB as hard links"
        held = "configurations checked" if self.checked else "NOT CHECKED: pip install 'tritonclient[grpc]'"
        return f"Triton: {len(self.models)} models in {self.folder}, {size}; {held}"


def write(model: OptimizedModel, package: Path) -> Repository:
    """Write the repository of a model that was just exported to `package`, say so in its manifest, and check it.

    Raises BackendError for a model whose steps the Python model cannot do, or that Triton has no types for.
    """
    graphs = {path.stem: of_graph(path.stem, path) for path in sorted(package.glob("*.onnx"))}
    _check_family(model)
    _check_runs(graphs)
    root = package / FOLDER
    copied = linked = 0
    for name, config in graphs.items():
        version = _start(root, config)
        for source, target in ((package / f"{name}.onnx", "model.onnx"), (package / WEIGHTS, WEIGHTS)):
            more = place(source, version / target)
            copied += more
            linked += source.stat().st_size - more
    known = {**facts(model), "graphs": {name: config.names() for name, config in graphs.items()}}
    for name in (WHOLE, STREAM):
        version = _start(root, _driver(name, graphs["vision_encoder"], known))
        shutil.copyfile(Path(__file__).with_name("model.py"), version / "model.py")
    record(package)
    own = sum(path.stat().st_size for path in root.rglob("*") if path.suffix in (".py", ".pbtxt"))
    models = tuple(sorted(path.name for path in root.iterdir()))
    return Repository(FOLDER, models, copied + own, linked, check(package))


def _check_family(model: OptimizedModel) -> None:
    about = model.program.info
    if not about.uniform:
        raise BackendError(
            f"images of {about.family} have grids of their own, which the Python model for Triton does not place: "
            "serve the package with Ray Serve"
        )


def facts(model: OptimizedModel) -> dict[str, Any]:
    """What the Python model must know of a model, apart from its graphs."""
    generation = model.generation_config
    ends = generation.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else [*ends]
    pad = generation.pad_token_id
    return {
        **prompts_of(model),
        "eos_token_ids": ends,
        "pad_token_id": pad if pad is not None else ends[0] if ends else 0,
    }


def _check_runs(graphs: Mapping[str, Config]) -> None:
    if any(spec.name.startswith("scores.") for spec in graphs["decoder_step"].outputs):
        raise BackendError(
            "heavy-recent evicts keys at every step, which the Python model for Triton does not do: take snapkv, or "
            "serve the package with Ray Serve"
        )
    for spec in graphs["decoder_prefill"].inputs:
        if spec.name not in TAKEN:
            raise BackendError(f"the Python model for Triton makes no {spec.name}, which decoder_prefill takes")


def _driver(name: str, vision: Config, known: Mapping[str, Any]) -> Config:
    """The Python model's configuration; what the vision tower takes is there for prompts with images."""
    prompt = (
        TensorSpec("input_ids", "TYPE_INT64", (-1, -1)),
        TensorSpec("attention_mask", "TYPE_INT64", (-1, -1), optional=True),
        TensorSpec("max_new_tokens", "TYPE_INT32", (1,), optional=True),
    )
    images = tuple(TensorSpec(each.name, each.type, each.dims, optional=True) for each in vision.inputs)
    answer = (TensorSpec("token_ids", "TYPE_INT64", (-1, -1)),)
    return Config(name, "python", (*prompt, *images), answer, known, name == STREAM, INSTANCES)


def _start(root: Path, config: Config) -> Path:
    """Write a model's configuration; the folder of its first version."""
    version = root / config.name / "1"
    version.mkdir(parents=True)
    (root / config.name / "config.pbtxt").write_text(config.to_text(), encoding="ascii")
    return version
