"""Measuring a runner: tokens per second, time per token, and the memory's rate that bounds them."""
