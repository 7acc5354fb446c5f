"""Runtimes behind one protocol, `base.Runner`; `open_runner` loads a bundle into one of them."""

from dijiang_engines.runners.base import Runner
from dijiang_engines.runners.registry import RUNNERS, open_runner

__all__ = ["RUNNERS", "Runner", "open_runner"]
