"""The CUDA kernels beside others."""
