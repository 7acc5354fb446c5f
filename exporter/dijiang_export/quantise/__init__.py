"""Quantised weights: elements and scales of a block, which matrices get how many bits, error compensation."""
