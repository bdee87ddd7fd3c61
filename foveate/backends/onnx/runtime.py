"""ONNX Runtime itself: whether it is there, and sessions over files. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from foveate.errors import ArtifactError, BackendError

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
PROVIDERS = (CUDA, CPU)
"""In the order in which they are wanted, where they are installed."""


def installed() -> Any:
    """The onnxruntime package; BackendError where it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise BackendError(
            "the onnx backend needs ONNX Runtime: pip install onnxruntime (or onnxruntime-gpu for CUDA)"
        ) from None
    return onnxruntime


def options(threads: int) -> Any:
    """Session options: so many threads (0: as many as ONNX Runtime counts cores), which do not spin between runs."""
    chosen = installed().SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.log_severity_level = 3
    chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return chosen


def open_file(path: Path, threads: int, providers: Sequence[Any] | None = None, optimized: bool = True) -> Any:
    """A session of a package's graph; ArtifactError where ONNX Runtime does not take it.

    providers: as ONNX Runtime takes them; the best that are installed, if not given. optimized: whether it may rewrite
    the graph.
    """
    ort = installed()
    chosen = options(threads)
    if not optimized:
        chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return ort.InferenceSession(path, chosen, providers=list(providers or available()))
    except Exception as error:  # whatever ONNX Runtime raises on a damaged file
        raise ArtifactError(f"{path} cannot be opened by ONNX Runtime: {first_line(error)}") from None


def available() -> list[str]:
    """The providers that this ONNX Runtime has, the best first."""
    there = installed().get_available_providers()
    return [name for name in PROVIDERS if name in there]


def first_line(error: Exception) -> str:
    """What an exception says first, or its kind."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
