"""Passes: what foveate can do to a program. One pass a file; `PASSES` is the whole list."""

from foveate.passes.base import Pass
from foveate.passes.cut_visual import CutVisual
from foveate.passes.drop_visual_heads import DropVisualHeads
from foveate.passes.drop_visual_neurons import DropVisualNeurons
from foveate.passes.neighbor_attention import NeighborAttention
from foveate.passes.pipeline import PASSES, parse_pipeline, pipeline_text
from foveate.passes.select import DivPrune, FastV, GridPrune, PyramidDrop, RandomPrune

__all__ = [
    "PASSES",
    "CutVisual",
    "DivPrune",
    "DropVisualHeads",
    "DropVisualNeurons",
    "FastV",
    "GridPrune",
    "NeighborAttention",
    "Pass",
    "PyramidDrop",
    "RandomPrune",
    "parse_pipeline",
    "pipeline_text",
]
