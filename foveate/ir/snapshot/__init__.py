"""Stable pictures of programs, to be committed and compared."""

from foveate.ir.snapshot.file import Snapshot, read_snapshot
from foveate.ir.snapshot.make import snapshot

__all__ = ["Snapshot", "read_snapshot", "snapshot"]
