"""TensorRT behind the Runner protocol."""
