"""The runners that ONNX Runtime is behind, and its own names for what each runs on."""

from __future__ import annotations

CPU, CUDA, RTX = "onnxruntime-cpu", "onnxruntime-cuda", "onnxruntime-rtx"
PROVIDERS = {
    CPU: "CPUExecutionProvider", CUDA: "CUDAExecutionProvider", RTX: "NvTensorRTRTXExecutionProvider",
}  # fmt: skip
