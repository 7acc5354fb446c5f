"""Checkpoint folders of every family, read in blocks and never run."""
