"""ONNX files that may be anything: read without their weights, with one clear error for what is none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from foveate.errors import ArtifactError, BackendError

if TYPE_CHECKING:
    import onnx

LARGEST = 2**31 - 1
"""Bytes of the largest protobuf message."""

MOST_NODES = 1_000_000
"""Nodes that a model may have once calls of its functions are written out."""


def read(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """A model without its external data; ArtifactError for a file that is no ONNX model."""
    package = _onnx()
    path = Path(path)
    try:
        if not path.is_file():
            raise ArtifactError(f"{path} is not a file")
        if path.stat().st_size > LARGEST:
            raise ArtifactError(f"{path} is no ONNX model: it is larger than 2 GiB, so its weights are not outside")
        content = path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror or error}") from None
    model: onnx.ModelProto = package.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception:  # The decoder's own error class depends on which protobuf there is.
        raise ArtifactError(f"{path} is no ONNX model: it cannot be decoded") from None
    if not model.graph.node or not model.opset_import:
        raise ArtifactError(f"{path} is no ONNX model: it has no nodes, or names no opset")
    if not _is_text(model):
        raise ArtifactError(f"{path} is no ONNX model: a name in it is no Unicode text")
    return model


def every_node(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes, each followed by those of its subgraphs."""
    for node in nodes:
        yield node
        for _, graph in subgraphs(node):
            yield from every_node(graph.node)


def subgraphs(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """A node's subgraphs, with the names of the attributes that hold them."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for graph in attribute.graphs:
            yield attribute.name, graph


def without_functions(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model with its local functions written out where they are called; ArtifactError where that has no end."""
    if not model.functions:
        return model
    _onnx()
    from onnx import inliner

    functions = {(f.domain, f.name): f for f in model.functions}
    open_calls: list[tuple[str, str]] = []

    @cache
    def count(key: tuple[str, str]) -> int:
        if key in open_calls:
            raise ArtifactError(f"{name}: the function {key[1]} calls itself")
        if len(open_calls) > 100:
            raise ArtifactError(f"{name}: functions call each other more than 100 deep")
        open_calls.append(key)
        total = nodes(functions[key].node)
        open_calls.pop()
        return total

    def nodes(body: Iterable[onnx.NodeProto]) -> int:
        total = 0
        for node in body:
            key = (node.domain, node.op_type)
            total += count(key) if key in functions else 1
            for attribute in node.attribute:
                total += sum(nodes(g.node) for g in (attribute.g, *attribute.graphs))
        return total

    if nodes(model.graph.node) + sum(count(key) for key in functions) > MOST_NODES:
        raise ArtifactError(f"{name}: with its functions written out it has more than {MOST_NODES} nodes")
    try:
        return inliner.inline_local_functions(model)
    except Exception as error:
        raise ArtifactError(f"{name}: its functions cannot be written out: {_line(error)}") from None


def with_shapes(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """The model with the types and shapes that can be inferred; ArtifactError where they contradict each other."""
    package = _onnx()
    try:
        inferred: onnx.ModelProto = package.shape_inference.infer_shapes(model, data_prop=True)
        return inferred
    except Exception as error:
        raise ArtifactError(f"{name} is no valid ONNX model: {_line(error)}") from None


def _is_text(message: Any) -> bool:
    """Whether every string in a protobuf message is one; the decoder leaves those that are not as bytes."""
    for field, value in message.ListFields():
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        items = [value] if isinstance(value, (str, bytes)) or hasattr(value, "ListFields") else value
        if not all(_is_text(item) if hasattr(item, "ListFields") else isinstance(item, str) for item in items):
            return False
    return True


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _onnx() -> ModuleType:
    try:
        import onnx
        import onnx.shape_inference
    except ImportError:
        raise BackendError("the tensorrt backend needs onnx: pip install 'foveate[onnx]'") from None
    return onnx
