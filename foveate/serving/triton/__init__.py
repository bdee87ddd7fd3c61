"""Triton Inference Server: a model repository beside an exported package, and what holds it to the package."""

from foveate.serving.triton.check import check
from foveate.serving.triton.repository import Repository, write

__all__ = ["Repository", "check", "write"]
