"""Checkpoints as readers of texts: the PyTorch reference, and transformers' own models of vanilla ones."""
