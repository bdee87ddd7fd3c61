"""Neighbourhoods in images: what the `grids` of `foveate::neighbor_attention` promise, and how the op is computed.

Arithmetic on integers only: a forecast, which has no tensors, comes to the same plan as the run.
"""

from foveate.neighborhood.grids import METRICS, Call, Grid, Grids, read_grids
from foveate.neighborhood.layouts import Block, Tiles
from foveate.neighborhood.plan import Plan, plan

__all__ = ["METRICS", "Block", "Call", "Grid", "Grids", "Plan", "Tiles", "plan", "read_grids"]
