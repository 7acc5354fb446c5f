"""Checkpoint folders of every family, read in blocks and never run."""

from dijiang_engines.former_paths import attributes

__getattr__ = attributes(__name__)  # what was in the module of this name
