"""The copy of a graph that TensorRT gets, where it differs from the one that ONNX Runtime runs.

    Attention(q, k, v, softmax_precision=1)    before
    Attention(q, k, v, TRT_decomposable=1)     after

`TRT_decomposable` lets TensorRT compute the node from matmuls where it has no fused kernel; ONNX Runtime refuses the
attribute. The parser refuses `softmax_precision`, so the copy leaves the precision of the softmax to TensorRT. Calls of
local functions become nodes for the plugin (`foveate.backends.tensorrt.plugin`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.backends.tensorrt import plugin
from foveate.backends.tensorrt.reading import every_node

if TYPE_CHECKING:
    import onnx


def adapted(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """A copy for TensorRT, with the same weights in the same places; None if the graph can be taken as it is."""
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    plugged = bool(plugin.kernels(model))
    if plugged:
        plugin.convert(copy)
    bodies = (copy.graph.node, *(function.node for function in copy.functions))
    attentions = [node for body in bodies for node in every_node(body) if _is_attention(node)]
    for node in attentions:
        _adapt(node)
    return copy if attentions or plugged else None


def _is_attention(node: onnx.NodeProto) -> bool:
    return node.op_type == "Attention" and node.domain in ("", "ai.onnx")


def _adapt(node: onnx.NodeProto) -> None:
    from onnx import helper

    kept = [a for a in node.attribute if a.name not in ("softmax_precision", "TRT_decomposable")]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute("TRT_decomposable", 1)])
