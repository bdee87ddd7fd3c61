"""What differs between two programs, and gates on it."""

from foveate.ir.diff.compare import Diff, diff

__all__ = ["Diff", "diff"]
