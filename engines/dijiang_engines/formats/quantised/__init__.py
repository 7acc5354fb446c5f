"""Quantised weights in bundles: what the manifest says of them, and what graphs do with them."""
