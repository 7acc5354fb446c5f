"""Benchmarks that may use PyTorch."""
