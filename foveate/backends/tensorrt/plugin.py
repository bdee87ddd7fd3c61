"""Neighbour attention as a TensorRT plugin: a Triton kernel, compiled ahead of time; EXPERIMENTAL, never run.

    NAME(q, k, v, text_k, text_v, images, mask)                       before: a local function
    neighbor_attention(q, k, v, text_k, text_v, images; kernel=NAME)  after: a node that the parser gives to the plugin

    trt/NAME.sm80.ptx, sm90, sm100      the kernel for each kind of GPU
    trt/plugin.json                     how each is launched, and its hash
    trt/foveate_plugin.py               registers the plugin, on the machine that builds the engine

An engine holds the kernel itself: what runs it needs neither Python nor these files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from importlib.resources import files as resources
from typing import TYPE_CHECKING, Any

from foveate.backends.onnx.nodes import DOMAIN, needed
from foveate.kernels.neighbor.plugin import PluginKernel

if TYPE_CHECKING:
    import onnx

NAME = "neighbor_attention"
SCRIPT = "foveate_plugin.py"
CAPABILITIES = (80, 90, 100)


def kernels(model: onnx.ModelProto) -> dict[str, PluginKernel]:
    """The kernels that a graph's calls are for, by name."""
    return {node.op_type: _kernel(node) for node in model.graph.node if node.domain == DOMAIN}


def convert(model: onnx.ModelProto) -> None:
    """Make nodes for the plugin of all calls, in place, and drop what only the function bodies needed."""
    from onnx import helper

    for node in model.graph.node:
        if node.domain != DOMAIN:
            continue
        name = node.op_type
        node.domain, node.op_type = "", NAME
        del node.input[6:], node.attribute[:]
        given = {"kernel": name, "plugin_namespace": DOMAIN, "aot": 1}
        node.attribute.extend(helper.make_attribute(key, value) for key, value in given.items())
    del model.functions[:]
    left = [entry for entry in model.opset_import if entry.domain != DOMAIN]
    del model.opset_import[:]
    model.opset_import.extend(left)
    _drop_unread(model.graph)


def files(made: Mapping[str, PluginKernel]) -> dict[str, bytes]:
    """The files of the plugin, by their name in `trt/`; BackendError where a kernel cannot be compiled."""
    found: dict[str, bytes] = {}
    table: dict[str, Any] = {}
    for name, kernel in sorted(made.items()):
        table[name] = {}
        for capability in CAPABILITIES:
            compiled = kernel.ptx(capability)
            file, code = f"{name}.sm{capability}.ptx", compiled.ptx.encode()
            found[file] = code
            table[name][str(capability)] = {
                "file": file,
                "sha256": hashlib.sha256(code).hexdigest(),
                "entry": compiled.entry,
                "threads": 32 * compiled.warps,
                "shared_bytes": compiled.shared,
                "tiles": compiled.tiles,
                "key_heads": kernel.key_heads,
            }
    found["plugin.json"] = json.dumps({"kernels": table}, indent=2).encode() + b"\n"
    found[SCRIPT] = (resources(__package__) / "on_target.py").read_bytes()
    return found


def registering(script: str) -> str:
    """A build script that registers the plugin before anything else."""
    lines = script.splitlines(keepends=True)
    place = next(i for i, line in enumerate(lines) if line.startswith(("import ", "from ")))
    return "".join([*lines[:place], f"import {SCRIPT.removesuffix('.py')}  # registers the plugin\n", *lines[place:]])


def _kernel(node: onnx.NodeProto) -> PluginKernel:
    from onnx import helper

    given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    kinds = {field.name: str(field.type) for field in fields(PluginKernel)}
    read = {"str": lambda value: value.decode(), "bool": bool}
    return PluginKernel(**{name: read.get(kind, lambda value: value)(given[name]) for name, kind in kinds.items()})


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Leave out the nodes, weights and inputs that no output needs."""
    kept, wanted = needed(graph.node, (output.name for output in graph.output))
    tensors = [tensor for tensor in graph.initializer if tensor.name in wanted]
    inputs = [given for given in graph.input if given.name in wanted]
    del graph.node[:], graph.initializer[:], graph.input[:]
    graph.node.extend(kept)
    graph.initializer.extend(tensors)
    graph.input.extend(inputs)
