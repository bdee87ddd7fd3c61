"""Runs a package's graphs to hold them to eager torch: as they are, or in another way, which says what it is.

ONNX Runtime's CPU has no bfloat16 kernel for most operators, and numpy has no such type. So graphs in bfloat16 are run
as copies, made for the comparison alone, in which every operator computes in fp32 what it is given, and what it gives
is rounded to bfloat16:

    y = Gemm(x, w)     ->     y = Cast(Cast(Gemm(x, Cast(w, fp32)), bf16), fp32)

That is what a kernel for bfloat16 does, which adds up in fp32 too. All else is as in the package's own graphs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from onnx import TensorProto, helper

from foveate.backends.base import Runner
from foveate.backends.onnx import runtime
from foveate.backends.onnx.names import FILES
from foveate.backends.onnx.session import open_file, runner
from foveate.errors import ArtifactError
from foveate.ir.program import Program

BF16, FP32 = TensorProto.BFLOAT16, TensorProto.FLOAT

COPY = ".check.onnx"
"""Ends the name of a copy, which lies beside the weights while it is opened."""

MOVES = frozenset(
    ("Concat", "Expand", "Gather", "GatherElements", "GatherND", "Identity", "Loop", "Pad")
    + ("Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze", "Where")
)
"""Operators whose results are among what they are given, so that there is nothing to round."""

_MISSING = re.compile(r"Could not find an implementation for (\w+)\(")


def open_checked(program: Program, folder: Path) -> tuple[dict[str, Runner], str]:
    """A runner for each graph of a program that was exported to `folder`, and in words how it runs them.

    Raises ArtifactError where ONNX Runtime takes neither a graph nor its copy.
    """
    files = {name: folder / FILES[name] for name in program.graphs}
    provider = f"ONNX Runtime ({runtime.available()[0].removesuffix('ExecutionProvider')})"
    if program.dtype != torch.bfloat16:
        runners = {name: runner(open_file(files[name]), name, graph) for name, graph in program.graphs.items()}
        return runners, f"run as written by {provider}"
    missing = sorted({kind for path in files.values() for kind in _without_kernel(path)})
    runners = {name: runner(_open_copy(files[name]), name, graph) for name, graph in program.graphs.items()}
    without = f"{provider} has no bfloat16 kernel for {', '.join(missing)} at least"
    why = without if missing else "numpy has no bfloat16"
    return runners, (
        f"not run here as written: {why}; checked by copies that compute each operator in fp32 and round to bfloat16"
    )


def _without_kernel(path: Path) -> list[str]:
    """The first operator of a graph that ONNX Runtime has no kernel for, if there is one; it names no others."""
    try:
        open_file(path)
    except ArtifactError as error:
        return _MISSING.findall(str(error))
    return []


def _open_copy(path: Path) -> object:
    copy = path.with_name(path.stem + COPY)
    try:
        copy.write_bytes(in_fp32(onnx.load(path, load_external_data=False)).SerializeToString())
        # What is optimized may leave roundings out.
        return runtime.open_file(copy, torch.get_num_threads(), optimized=False)
    finally:
        copy.unlink(missing_ok=True)


def in_fp32(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a graph that takes and gives fp32 for bfloat16, and rounds to bfloat16 behind every operator."""
    halves = set(_halves(onnx.shape_inference.infer_shapes(model).graph))
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = {each.name for each in copy.graph.initializer if each.data_type == BF16}
    _widen(copy.graph, halves, weights)
    casts = [helper.make_node("Cast", [name], [_as(name, "fp32")], to=FP32) for name in sorted(weights)]
    nodes = [*casts, *copy.graph.node]
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


def _as(name: str, kind: str) -> str:
    return f"{name} as {kind}"


def _halves(graph: onnx.GraphProto) -> Iterator[str]:
    """Names of a graph's values in bfloat16, those in loops' bodies included."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == BF16:
            yield value.name
    for node in graph.node:
        for found in node.attribute:
            yield from _halves(found.g)


def _widen(graph: onnx.GraphProto, halves: set[str], weights: set[str]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == BF16:
            value.type.tensor_type.elem_type = FP32
    nodes = []
    for node in graph.node:
        node.input[:] = [_as(name, "fp32") if name in weights else name for name in node.input]
        for found in node.attribute:
            if found.HasField("g"):
                _widen(found.g, halves, weights)
        nodes.append(node)
        if node.op_type in MOVES:
            continue
        for place, name in enumerate(node.output):
            if name not in halves:
                continue
            half = _as(name, "bf16")
            if node.op_type == "Cast":
                node.output[place] = half
            else:
                node.output[place] = _as(name, "sum")
                nodes.append(helper.make_node("Cast", [node.output[place]], [half], to=BF16))
            nodes.append(helper.make_node("Cast", [half], [name], to=FP32))
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
