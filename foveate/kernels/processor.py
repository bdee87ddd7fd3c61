"""The processor at hand."""

from __future__ import annotations

import functools
import platform


@functools.cache
def cpu_name() -> str:
    """The processor as it calls itself."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


@functools.cache
def cpu_flags() -> str:
    """The instruction sets that it has, in order; empty where the system does not say."""
    return " ".join(sorted(_cpuinfo("flags").split()))


def _cpuinfo(field: str) -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123  a pseudo file
            return next(line.partition(":")[2].strip() for line in lines if line.startswith(field))
    except (OSError, StopIteration):
        return ""
