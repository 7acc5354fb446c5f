"""The runners that ONNX Runtime is behind, and its own names for what each runs on."""

from __future__ import annotations

CPU, CUDA = "onnxruntime-cpu", "onnxruntime-cuda"
PROVIDERS = {CPU: "CPUExecutionProvider", CUDA: "CUDAExecutionProvider"}
