"""Evicting keys and values from the cache, one method a file; they come last in a pipeline."""

from foveate.passes.kv.heavy_recent import HeavyRecent
from foveate.passes.kv.snapkv import SnapKV

__all__ = ["HeavyRecent", "SnapKV"]
