"""ONNX Runtime behind the Runner protocol, on CPUs and on CUDA."""
