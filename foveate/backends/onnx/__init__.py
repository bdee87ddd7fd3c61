"""ONNX: a program's graphs in standard operators, for ONNX Runtime and whatever else reads them."""

from foveate.backends.onnx.lowering import lower

__all__ = ["lower"]
