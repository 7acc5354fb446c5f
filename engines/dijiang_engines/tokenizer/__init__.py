"""Text to tokens and back, for tokenizer.json files of strangers."""

from dijiang_engines.former_paths import attributes

__getattr__ = attributes(__name__)  # what was in the module of this name
