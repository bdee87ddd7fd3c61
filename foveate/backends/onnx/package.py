"""The ONNX files of a package: written beside `model.safetensors`, to which all of them refer, and checked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import onnx

from foveate.backends.base import joined_graph
from foveate.backends.onnx.emit import Place
from foveate.backends.onnx.graphs import BLOCKS, WEIGHTS, build, embed_tokens
from foveate.backends.onnx.names import FILES
from foveate.backends.onnx.opsets import OPSET
from foveate.errors import BackendError
from foveate.ir.program import Program
from foveate.manifest import GRAPHS

EMBED = GRAPHS["embed"]


def write_graphs(
    program: Program, folder: Path, blocks: int = BLOCKS, opset: int = OPSET, plugin: bool = False
) -> list[str]:
    """Write a program's graphs into a folder that holds its weights; the names of the files.

    blocks, opset, plugin: see `build`. Raises BackendError where a graph does not pass ONNX's checker, and where there
    is nothing for the plugin.
    """
    places = places_of(folder / WEIGHTS)
    models = dict(_models(program, places, blocks, opset, plugin))
    if plugin and not any(model.functions for model in models.values()):
        raise BackendError(
            "the plugin has nothing to do here: it runs neighbor-attention{metric=chebyshev} or euclidean, of models "
            "whose images all have one grid, before tokens are removed; leave the plugin out"
        )
    return [_write(model, folder / name) for name, model in models.items()]


def _models(
    program: Program, places: dict[str, Place], blocks: int, opset: int, plugin: bool
) -> Iterator[tuple[str, onnx.ModelProto]]:
    for name, graph in program.graphs.items():
        joined = joined_graph(program, name, graph)
        yield FILES[name], build(program, name, joined, places, blocks, opset, plugin)
    yield EMBED, embed_tokens(program, places, opset)


def _write(model: onnx.ModelProto, path: Path) -> str:
    path.write_bytes(model.SerializeToString(deterministic=True))
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BackendError(f"{path.name} does not pass ONNX's checker: {str(error).strip().splitlines()[0]}") from None
    return path.name


def places_of(path: Path) -> dict[str, Place]:
    """Where each tensor of a safetensors file lies: its header is JSON, whose length stands in front."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: Place(8 + length + entry["data_offsets"][0], entry["data_offsets"][1] - entry["data_offsets"][0])
        for name, entry in header.items()
    }
