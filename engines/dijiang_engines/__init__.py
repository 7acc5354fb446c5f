"""From bundle to tokens: readers, runners, generation and validation. Never imports torch."""

__version__ = "0.1.0"
