"""Saved programs: a flat folder of JSON, text and safetensors. Nothing in it is executed or unpickled.

    foveate.json            format, versions, what was pruned, sha256 of every other file
    program.txt             the tower's and the prefill graph (`foveate.ir.text`); decode is derived from them
    model.safetensors       every weight that a graph uses, once
    config.json  generation_config.json     as transformers writes them

A folder is written under a temporary name and renamed, so that it is there whole or not at all.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from foveate import __version__
from foveate.backends.adapters import adapter_layers
from foveate.backends.onnx.lowering import open_package
from foveate.errors import ArtifactError
from foveate.ir.decode import derive_decode
from foveate.ir.program import PassRecord, Program, Symbols, Weights
from foveate.ir.rules import verify
from foveate.ir.text import parse_graphs
from foveate.manifest import FILES, FORMAT, MANIFEST, read_manifest, reading, sha256
from foveate.model import OWN, OptimizedModel
from foveate.models.registry import FAMILIES


def save(model: OptimizedModel, folder: Path) -> None:
    """Write `model` to `folder`, which must not exist yet; ArtifactError if it does or cannot be written."""
    with new_folder(folder) as work:
        write_model(model, work)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` to write to, which takes its name when everything went well, and is gone otherwise."""
    if folder.exists():
        raise ArtifactError(f"{folder} exists already; give a new folder, or remove it first")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be written: {error.strerror or error}") from None
    try:
        yield work
        work.chmod(0o755)
        work.rename(folder)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def save_into(model: OptimizedModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write `model` into a folder that may exist and hold other things, over an earlier save.

    state: the weights as `model.state_dict()` names them, where they are gathered from several processes. The manifest
    goes first and comes last, so that what lies there when the work is interrupted is not taken for a saved model.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=".foveate-", dir=folder))
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be written: {error.strerror or error}") from None
    try:
        write_model(model, work, state)
        (folder / MANIFEST).unlink(missing_ok=True)
        for name in (*FILES, MANIFEST):
            (work / name).replace(folder / name)
    except OSError as error:
        raise ArtifactError(f"{folder} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _check(model: OptimizedModel) -> None:
    if model.program.weights.device().type == "meta":
        raise ArtifactError("a model on the meta device has no weights to save")
    if adapter_layers(model.program):
        raise ArtifactError(
            "the model has adapters that are not merged: save them through peft (peft_model.save_pretrained), or merge "
            "them first (peft_model.merge_and_unload())"
        )


def write_model(model: OptimizedModel, work: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write the files of a model, the manifest last, into a folder that is there."""
    _check(model)
    program = model.program
    used = program.used_weights()
    state = model.state_dict() if state is None else state
    tensors = {name: state[OWN + name].detach().contiguous() for name in program.weights.names if name in used}
    save_file(tensors, work / "model.safetensors", metadata={"format": "pt"})
    (work / "model.safetensors").chmod(0o644)  # safetensors writes 0600; the other files are readable too
    text = "\n".join(program.to_text(name) for name in program.graphs if name != "decode")
    (work / "program.txt").write_text(text, encoding="utf-8")
    config = {**model.config.to_dict(), "model_type": model.config.model_type}
    (work / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    model.generation_config.to_json_file(work / "generation_config.json", use_diff=True)
    manifest = {
        "format": FORMAT,
        "versions": {"foveate": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "passes": [dataclasses.asdict(record) for record in program.passes],
        "parameters": sorted(n for n, v in program.weights.items() if n in used and isinstance(v, nn.Parameter)),
        "files": {name: sha256(work / name) for name in FILES},
    }
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def add_graphs(work: Path, names: Sequence[str], model: OptimizedModel, opset: int) -> None:
    """Say in the manifest of a folder just written that it has these graphs too, of that opset, and runs by them.

    What `foveate.runner` must know of prompts stands beside them, so that it need not understand configurations.
    """
    told = {"prompts": prompts_of(model)} if model.program.info.uniform else {}
    _amend(work, backend="onnx", opset=opset, files={name: sha256(work / name) for name in names}, **told)


def prompts_of(model: OptimizedModel) -> dict[str, int]:
    """What whoever runs a model's graphs must know of prompts: see `foveate.runner.prompts.Vocabulary`."""
    about = model.program.info
    end = {} if about.position_limit is None else {"position_limit": about.position_limit}
    return {
        "image_token_id": about.image_token_id,
        "tokens_per_image": about.tokens_per_image,
        "columns": about.grid[1],
        "vocabulary": len(model.program.weights.get(about.paths["embed"])),
        "longest": model.config.get_text_config().max_position_embeddings,
        **end,
    }


def mark_compiled(work: Path) -> None:
    """Say in the manifest of a folder just written that it runs by code compiled for it, which lies in a cache."""
    _amend(work, backend="aoti", files={})


def mark_tensorrt(work: Path, status: str, missing: Sequence[str]) -> None:
    """Say in the manifest of a folder just written how far TensorRT got: built, or prepared, and what was missing."""
    _amend(work, files={}, tensorrt={"status": status, "missing": list(missing)})


def _amend(work: Path, files: dict[str, str], **entries: Any) -> None:
    """Add entries, and files with their sha256, to the manifest of a folder just written."""
    manifest = json.loads((work / MANIFEST).read_text(encoding="utf-8"))
    manifest |= {**entries, "files": manifest["files"] | files}
    (work / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def load(folder: Path, backend: str | None, device: str) -> OptimizedModel:
    """Read what `save` or `foveate.export` wrote; backend None: what it was written for.

    Raises ArtifactError for a folder that is missing, foreign, of another format, or whose files are not those
    that were written.
    """
    manifest = read_manifest(folder)
    with reading(folder / "config.json"):
        config = _config(folder)
        info = FAMILIES[config.model_type].describe(config)
    with reading(folder / "generation_config.json"):
        generation = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
    backend = backend or manifest.get("backend", "eager")
    packaged = backend == "onnx" and "decoder_prefill.onnx" in manifest["files"]
    with reading(folder / "model.safetensors"):
        weights = _weights(folder, manifest["parameters"], device, copy=not packaged)
        table = weights.get(info.paths["embed"])
        if table.dim() != 2 or table.shape[1] != info.hidden_size or not table.is_floating_point():
            raise ValueError(f"the token embedding is {table.dtype} {tuple(table.shape)}")
    with reading(folder / MANIFEST):
        records = [PassRecord(**_record(record)) for record in manifest["passes"]]
    program = Program(info, weights, Symbols(), passes=records)
    with reading(folder / "program.txt"):
        program.graphs = parse_graphs(program, (folder / "program.txt").read_text(encoding="utf-8"))
        if set(program.graphs) - {"vision_rest"} != {"vision", "prefill"}:
            raise ValueError("it must hold the graphs vision and prefill, and may hold vision_rest")
        verify(program)
        program.graphs["decode"] = derive_decode(program)
        verify(program)
    lowered = partial(open_package, program, folder) if packaged else None
    if backend == "aoti" == manifest.get("backend"):
        from foveate.backends.aoti import open_saved

        with reading(folder / MANIFEST):
            version = str(manifest["versions"]["torch"])
        lowered = partial(open_saved, program, folder, version)
    return OptimizedModel(program, config, generation, backend, lowered)


def _config(folder: Path) -> Any:
    content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = content["model_type"]
    if kind not in transformers.CONFIG_MAPPING:
        raise ValueError(f"config.json has the unknown model_type {kind!r}")
    return transformers.CONFIG_MAPPING[kind].from_dict(content)


def _record(fields: dict[str, Any]) -> dict[str, Any]:
    cost = {k: (_number(a), _number(b)) for k, (a, b) in (fields.get("cost") or {}).items()}
    return {**fields, "notes": tuple(fields["notes"]), "cost": cost or None}


def _number(value: Any) -> float:
    if not isinstance(value, (int, float)):
        raise ValueError(f"a cost is {value!r}, which is no number")
    return value


def _weights(folder: Path, parameters: list[str], device: str, copy: bool) -> Weights:
    """All weights; those that another runtime reads for itself need no `copy`, and stay in the file until asked for."""
    weights = Weights()
    trainable = set(parameters)
    tensors = load_file(folder / "model.safetensors", device=device)
    for name in sorted(tensors):
        # A copy, because safetensors does not align what it reads, and alignment changes the last bits of a matmul.
        value = tensors.pop(name).clone() if copy else tensors.pop(name)
        if not all(part.isidentifier() or part.isdigit() for part in name.split(".")):
            raise ValueError(f"weight name {name!r}")
        weights.put(name, nn.Parameter(value) if name in trainable else value)
    if not weights.names:
        raise ValueError("it holds no weights")
    return weights
