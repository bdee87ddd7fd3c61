"""A program's graphs as ONNX models over one file of weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import onnx
from onnx import TensorProto, helper
from torch import Tensor, fx

from foveate import __version__
from foveate.backends.onnx import aten, attention, experts, fit, guided, kv, segments, selection, tower, vision
from foveate.backends.onnx.emit import ELEMENT, Emitter, Place, Writer
from foveate.backends.onnx.names import axis_name, input_name, named_outputs
from foveate.backends.onnx.nodes import DOMAIN, reads
from foveate.backends.onnx.opsets import IR_VERSIONS, OPSET
from foveate.errors import BackendError
from foveate.ir.program import Program

WEIGHTS = "model.safetensors"
BLOCKS = 4
"""ONNX Runtime's attention on a CPU computes what a mask hides: with 4 blocks of queries, 5/8 of a causal square."""

WRITERS: dict[Any, Writer] = {
    **aten.WRITERS,
    **attention.WRITERS,
    **experts.WRITERS,
    **selection.WRITERS,
    **fit.WRITERS,
    **guided.WRITERS,
    **kv.WRITERS,
    **vision.WRITERS,
    **tower.WRITERS,
    **segments.WRITERS,
}


def build(
    program: Program,
    name: str,
    graph: fx.Graph,
    places: Mapping[str, Place],
    blocks: int = BLOCKS,
    opset: int = OPSET,
    plugin: bool = False,
) -> onnx.ModelProto:
    """One graph of a program (a prefill already joined), whose weights lie at `places` in the file `WEIGHTS`.

    blocks, opset, plugin: see `Emitter`; 1 block leaves a layer's attention in one call, as fused kernels on a GPU want
    it. Raises BackendError where an op has no form in standard operators, naming the pass and the node.
    """
    emit = Emitter(program, places, WEIGHTS, WRITERS, blocks, opset, plugin)
    emit.run(graph)
    results = {label: str(emit.values[node]) for label, node in named_outputs(name, graph).items()}
    return finish(emit, name, _inputs(name, graph), results, named_outputs(name, graph))


def finish(
    emit: Emitter,
    name: str,
    given: Mapping[str, tuple[str, Tensor]],
    results: Mapping[str, str],
    described: Mapping[str, fx.Node],
) -> onnx.ModelProto:
    """The model: inputs and outputs under their names in a package, what nobody reads left out."""
    nodes, initializers = emit.used(list(results.values()))
    names = emit.program.symbols.names()
    read = {value for node in nodes for value in reads(node)}
    renamed = {inner: outer for outer, (inner, _) in given.items()}
    inputs = [
        _described(outer, value, names)
        for outer, (inner, value) in given.items()
        if inner in read or inner in results.values()
    ]
    for node in nodes:
        _rename(node, renamed)
    # An output has a node of its own, so that two may be the same value; an input that goes out again has none.
    for outer, inner in results.items():
        if renamed.get(inner) == outer:
            continue
        nodes.append(helper.make_node("Identity", [renamed.get(inner, inner)], [outer], name=f"output.{outer}"))
    outputs = [_described(outer, described[outer].meta["val"], names) for outer in results]
    return _model(helper.make_graph(nodes, name, inputs, outputs, initializers), emit.opset, emit.functions.values())


def _rename(node: onnx.NodeProto, renamed: Mapping[str, str]) -> None:
    node.input[:] = [renamed.get(value, value) for value in node.input]
    for found in node.attribute:
        for inner in found.g.node:
            _rename(inner, renamed)


def _inputs(name: str, graph: fx.Graph) -> dict[str, tuple[str, Tensor]]:
    """Name in the package -> name in the graph, and what it is; numbers are promises that no ONNX graph needs."""
    return {
        input_name(name, str(node.target)): (str(node.target), node.meta["val"])
        for node in graph.nodes
        if node.op == "placeholder" and isinstance(node.meta["val"], Tensor)
    }


def _described(name: str, value: Tensor, names: Mapping[Any, str]) -> onnx.ValueInfoProto:
    if value.dtype not in ELEMENT:
        raise BackendError(f"{name} is {value.dtype}, which ONNX graphs of foveate do not have")
    sizes: list[str | int | None] = [n if isinstance(n, int) else axis_name(n, names) for n in value.shape]
    return helper.make_tensor_value_info(name, ELEMENT[value.dtype], sizes)


def embed_tokens(program: Program, places: Mapping[str, Place], opset: int = OPSET) -> onnx.ModelProto:
    """input_ids int64 [batch, tokens] -> inputs_embeds; the image token, which the table may not have, gives row 0."""
    emit = Emitter(program, places, WEIGHTS, WRITERS, opset=opset)
    table = emit.weight(program.info.paths["embed"])
    image = emit.op("Equal", "input_ids", emit.constant(program.info.image_token_id))
    found = emit.op("Gather", table, emit.op("Where", image, emit.constant(0), "input_ids"))
    if program.info.embed_scale != 1:
        found = emit.op("Mul", found, emit.constant(program.info.embed_scale, program.dtype))
    nodes, initializers = emit.used([found])
    nodes.append(helper.make_node("Identity", [found], ["inputs_embeds"], name="output.inputs_embeds"))
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])
    width: list[str | int | None] = ["batch", "tokens", program.info.hidden_size]
    embeds = helper.make_tensor_value_info("inputs_embeds", ELEMENT[program.dtype], width)
    return _model(helper.make_graph(nodes, "embed_tokens", [ids], [embeds], initializers), opset)


def _model(graph: onnx.GraphProto, opset: int, functions: Collection[onnx.FunctionProto] = ()) -> onnx.ModelProto:
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(
        graph,
        opset_imports=[*opsets, helper.make_opsetid(DOMAIN, 1)] if functions else opsets,
        functions=functions,
        ir_version=IR_VERSIONS[opset],
        producer_name="foveate",
        producer_version=__version__,
    )
