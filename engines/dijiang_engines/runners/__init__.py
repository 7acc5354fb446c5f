"""Runtimes behind one protocol: `base.Runner`."""
