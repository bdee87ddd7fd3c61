"""Passes: what foveate can do to a program. One pass a file; `PASSES` is the whole list."""

from foveate.passes.base import Pass
from foveate.passes.cut_visual import CutVisual
from foveate.passes.drop_visual_heads import DropVisualHeads
from foveate.passes.drop_visual_neurons import DropVisualNeurons
from foveate.passes.neighbor_attention import NeighborAttention
from foveate.passes.pipeline import PASSES, parse_pipeline, pipeline_text
from foveate.passes.select import (
    DART,
    AveragePool,
    DivPrune,
    FasterVLM,
    FastV,
    GridPrune,
    PruMerge,
    PyramidDrop,
    RandomPrune,
    Resize,
    SparseVLM,
    VisionZip,
    VisPruner,
)

__all__ = [
    "DART",
    "PASSES",
    "AveragePool",
    "CutVisual",
    "DivPrune",
    "DropVisualHeads",
    "DropVisualNeurons",
    "FastV",
    "FasterVLM",
    "GridPrune",
    "NeighborAttention",
    "Pass",
    "PruMerge",
    "PyramidDrop",
    "RandomPrune",
    "Resize",
    "SparseVLM",
    "VisPruner",
    "VisionZip",
    "parse_pipeline",
    "pipeline_text",
]
