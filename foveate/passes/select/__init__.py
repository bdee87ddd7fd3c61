"""Selecting visual tokens inside the decoder: one method a file, each a score on the mechanism in `selector`."""

from foveate.passes.select.divprune import DivPrune
from foveate.passes.select.fastv import FastV
from foveate.passes.select.grid_prune import GridPrune
from foveate.passes.select.pyramiddrop import PyramidDrop
from foveate.passes.select.random_prune import RandomPrune

__all__ = ["DivPrune", "FastV", "GridPrune", "PyramidDrop", "RandomPrune"]
