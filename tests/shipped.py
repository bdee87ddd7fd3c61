"""Programs of the shipped configurations: traced once a process, without weights; nobody may edit them."""

from __future__ import annotations

import functools

from foveate.ir.program import Program
from foveate.models import configs
from foveate.models.registry import trace_program
from foveate.passes.pipeline import apply_pipeline


@functools.cache
def shipped(name: str) -> Program:
    """The dense program of a shipped configuration."""
    return trace_program(configs.weightless(name))


@functools.cache
def with_passes(name: str, passes: str) -> Program:
    """The same after a pipeline."""
    return apply_pipeline(shipped(name).copy(), passes)
