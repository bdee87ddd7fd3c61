"""Selecting visual tokens, one method a file: in the decoder on `selector`, in the vision tower on `vision`."""

from foveate.passes.select.average_pool import AveragePool
from foveate.passes.select.cdpruner import CDPruner
from foveate.passes.select.cls_curve import CLSCurve
from foveate.passes.select.crossget import CrossGET
from foveate.passes.select.dart import DART
from foveate.passes.select.divprune import DivPrune
from foveate.passes.select.dynamicvit import DynamicViT
from foveate.passes.select.fastervlm import FasterVLM
from foveate.passes.select.fastv import FastV
from foveate.passes.select.fitprune import FitPrune
from foveate.passes.select.grid_prune import GridPrune
from foveate.passes.select.lvpruning import LVPruning
from foveate.passes.select.prumerge import PruMerge
from foveate.passes.select.pyramiddrop import PyramidDrop
from foveate.passes.select.random_prune import RandomPrune
from foveate.passes.select.resize import Resize
from foveate.passes.select.smarttrim import SmartTrim
from foveate.passes.select.sparsevlm import SparseVLM
from foveate.passes.select.tome import ToMe
from foveate.passes.select.visionzip import VisionZip
from foveate.passes.select.vispruner import VisPruner

__all__ = [
    "DART",
    "AveragePool",
    "CDPruner",
    "CLSCurve",
    "CrossGET",
    "DivPrune",
    "DynamicViT",
    "FastV",
    "FasterVLM",
    "FitPrune",
    "GridPrune",
    "LVPruning",
    "PruMerge",
    "PyramidDrop",
    "RandomPrune",
    "Resize",
    "SmartTrim",
    "SparseVLM",
    "ToMe",
    "VisPruner",
    "VisionZip",
]
