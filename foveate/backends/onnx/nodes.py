"""Nodes of ONNX graphs: what they read, and which of them results need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

DOMAIN = "foveate"
"""Of local functions, which stay one node for who knows them and are standard operators for everybody else."""


def reads(node: onnx.NodeProto) -> set[str]:
    """The names that a node reads, those in a body included."""
    inner = (each for found in node.attribute if found.HasField("g") for each in found.g.node)
    return set(node.input).union(*(reads(each) for each in inner))


def needed(nodes: Sequence[onnx.NodeProto], results: Iterable[str]) -> tuple[list[onnx.NodeProto], set[str]]:
    """The nodes that results need, in order, and all names that are read or are results."""
    wanted, kept = set(results), []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= reads(node)
            kept.append(node)
    return kept[::-1], wanted
