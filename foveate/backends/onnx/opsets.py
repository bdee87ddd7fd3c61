"""Which opsets graphs are written in.

Three operators are younger than the oldest of them. The writers of `attention` and `aten` ask the emitter's opset and
spell out what it does not have:

    23, 24            Attention, RMSNormalization
    20, 21, 22        MatMul, Where, Softmax, MatMul;  Pow, ReduceMean, Reciprocal, Mul
"""

from __future__ import annotations

import torch
from onnx import __version__ as onnx_version
from onnx.defs import onnx_opset_version

from foveate.errors import BackendError

OPSET = 23
"""What is written if nothing else is said: the first with `Attention`, which runtimes have fast kernels for."""

IR_VERSIONS = {20: 9, 21: 10, 22: 10, 23: 11, 24: 12}
"""Opset -> the first version of ONNX's file format that has it (onnx/onnx docs/Versioning.md)."""

FUSED = 23
"""The first opset with `Attention` and `RMSNormalization`."""

BFLOAT16 = 22
"""The first opset whose `Conv`, `Cos` and `Sin` take bfloat16 (onnx/onnx docs/Changelog.md)."""


def checked(opset: int | None, dtype: torch.dtype) -> int:
    """The opset to write, `OPSET` for None; BackendError where graphs of that dtype are not written in it."""
    if opset is None:
        return OPSET
    if opset not in IR_VERSIONS:
        least, most = min(IR_VERSIONS), max(IR_VERSIONS)
        raise BackendError(
            f"opset {opset} is not written; there are {least} to {most}: before {least} there is no Gelu, and what is "
            f"behind {most} TensorRT's parser does not read"
        )
    if opset > onnx_opset_version():
        raise BackendError(f"opset {opset} needs a newer onnx than the {onnx_version} that is installed")
    if dtype == torch.bfloat16 and opset < BFLOAT16:
        raise BackendError(
            f"bfloat16 is not written in opset {opset}; there are {BFLOAT16} to {max(IR_VERSIONS)}: before {BFLOAT16} "
            "Conv, Cos and Sin do not take it"
        )
    return opset
