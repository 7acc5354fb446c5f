"""Run DiJiang models: from a bundle or an engine to tokens, on a CPU, a GPU or a Jetson. Never imports torch.

    import dijiang_engines as dj

    model = dj.open_model("tiny-stdlib.bundle")
    generator = dj.Generator(dj.open_runner(model), dj.load_tokenizer(model))
    for event in generator.start(["def main():"], dj.GenerateOptions(max_tokens=40)):
        print(event.text, end="", flush=True)

The names below are the library's face: they stay where they are from one version to the next. Each is
imported when it is first used, and a runtime only when something is opened with it. What goes wrong for a
reason that a user can do something about is a `DijiangError`.
"""

from __future__ import annotations

import importlib

from dijiang_engines import former_paths
from dijiang_engines.version import __version__

TYPE_CHECKING = False  # typing's, which takes longer to import than everything here
if TYPE_CHECKING:
    from typing import Any

    from dijiang_engines.errors import (
        BundleError,
        CheckpointError,
        DijiangError,
        KernelError,
        OutputError,
        PluginError,
        PositionError,
        PromptError,
        RunnerError,
        SessionError,
        TextError,
        UsageError,
        ValidationMismatch,
    )
    from dijiang_engines.formats.open import Model, open_model
    from dijiang_engines.generation.generator import Generator
    from dijiang_engines.generation.grammar import Grammar, Grammars
    from dijiang_engines.generation.loop import Completion, GenerateOptions, Generation, Stats, TokenEvent
    from dijiang_engines.generation.session import Session, load_session, save_session
    from dijiang_engines.runners.base import Runner
    from dijiang_engines.runners.checks import last_position, position_error
    from dijiang_engines.runners.registry import open_runner
    from dijiang_engines.sampling import SamplingOptions, sample, uniform
    from dijiang_engines.scoring.perplexity import Cutting, Perplexity, perplexity
    from dijiang_engines.scoring.texts import Joining
    from dijiang_engines.spec import ModelSpec
    from dijiang_engines.tokenizer.load import load_tokenizer
    from dijiang_engines.tokenizer.tokenizer import Tokenizer

_NAMES = {
    "errors": (
        "BundleError", "CheckpointError", "DijiangError", "KernelError", "OutputError", "PluginError",
        "PositionError", "PromptError", "RunnerError", "SessionError", "TextError", "UsageError",
        "ValidationMismatch",
    ),
    "formats.open": ("Model", "open_model"),
    "generation.generator": ("Generator",),
    "generation.grammar": ("Grammar", "Grammars"),
    "generation.loop": ("Completion", "GenerateOptions", "Generation", "Stats", "TokenEvent"),
    "generation.session": ("Session", "load_session", "save_session"),
    "runners.base": ("Runner",),
    "runners.checks": ("last_position", "position_error"),
    "runners.registry": ("open_runner",),
    "sampling": ("SamplingOptions", "sample", "uniform"),
    "scoring.perplexity": ("Cutting", "Perplexity", "perplexity"),
    "scoring.texts": ("Joining",),
    "spec": ("ModelSpec",),
    "tokenizer.load": ("load_tokenizer",),
    "tokenizer.tokenizer": ("Tokenizer",),
}  # fmt: skip
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}

__all__ = [
    "BundleError", "CheckpointError", "Completion", "Cutting", "DijiangError", "GenerateOptions",
    "Generation", "Generator", "Grammar", "Grammars", "Joining", "KernelError", "Model", "ModelSpec",
    "OutputError",
    "Perplexity", "PluginError", "PositionError", "PromptError", "Runner", "RunnerError",
    "SamplingOptions", "Session", "SessionError", "Stats", "TextError", "TokenEvent", "Tokenizer",
    "UsageError", "ValidationMismatch", "__version__", "last_position", "load_session",
    "load_tokenizer", "open_model", "open_runner", "perplexity", "position_error", "sample",
    "save_session", "uniform",
]  # fmt: skip

former_paths.install()


def __getattr__(name: str) -> Any:
    """A name of the face, imported now and kept."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
