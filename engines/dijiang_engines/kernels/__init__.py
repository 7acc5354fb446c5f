"""The CUDA kernels from Python, over their C ABI."""
