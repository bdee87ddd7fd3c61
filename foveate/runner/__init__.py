"""Runs exported packages over numpy arrays, on ONNX Runtime alone: nothing here imports torch or transformers."""

from foveate.runner.model import NextLogits, NumpyModel, open_package

__all__ = ["NextLogits", "NumpyModel", "open_package"]
