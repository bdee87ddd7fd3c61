"""Stable pictures of programs, to be committed and compared; `make` takes them, and alone needs torch."""

from foveate.ir.snapshot.file import Snapshot, read_snapshot

__all__ = ["Snapshot", "read_snapshot"]
