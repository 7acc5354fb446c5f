"""From bundle to tokens: readers, runners, generation and validation. Never imports torch."""

from dijiang_engines.version import __version__

__all__ = ["__version__"]
