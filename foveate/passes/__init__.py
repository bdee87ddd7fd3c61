"""Passes: what foveate can do to a program. One pass a file; `PASSES` is the whole list."""

from foveate.passes import kv, select
from foveate.passes.base import Pass
from foveate.passes.cut_visual import CutVisual
from foveate.passes.drop_visual_heads import DropVisualHeads
from foveate.passes.drop_visual_neurons import DropVisualNeurons
from foveate.passes.kv import *  # noqa: F403  its list is ours
from foveate.passes.neighbor_attention import NeighborAttention
from foveate.passes.pipeline import PASSES, parse_pipeline, pipeline_text
from foveate.passes.select import *  # noqa: F403  its list is ours

__all__ = [
    "PASSES",
    "CutVisual",
    "DropVisualHeads",
    "DropVisualNeurons",
    "NeighborAttention",
    "Pass",
    "parse_pipeline",
    "pipeline_text",
]
__all__ += [*select.__all__, *kv.__all__]
