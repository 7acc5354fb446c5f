"""Choosing tokens on a GPU: our kernel, and what PyTorch's operators take for it."""
