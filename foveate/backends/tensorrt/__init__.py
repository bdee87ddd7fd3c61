"""TensorRT: what its ONNX parser takes, and everything that a build needs, prepared without it."""
