"""Typed errors: what failed, what was found, what was expected, and what to do about it.

Every error that a user can cause is a `DijiangError`. The command line prints `str(error)` and
exits with `error.exit_code`; a library user catches the class.
"""

from __future__ import annotations

from dijiang_engines.printable import MOST, printable


class DijiangError(Exception):
    """A failure with one clear message, fit for a terminal: control characters in its parts are escaped, and
    a part of more than `printable.MOST` characters is cut.

    Args:
        what: what failed, as a sentence fragment without a full stop.
        got: what was found, if that is a value worth showing.
        expected: what would have been right.
        hint: what the user can do next.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        got: object | None = None,
        expected: object | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = printable(what, MOST)
        self.got = None if got is None else printable(_text(got), MOST)
        self.expected = None if expected is None else printable(_text(expected), MOST)
        self.hint = None if hint is None else printable(hint, MOST)
        super().__init__(self.what)

    def __str__(self) -> str:
        lines = [_indented(self.what, 2)]
        if self.got is not None:
            lines.append(f"  got: {_indented(self.got, 4)}")
        if self.expected is not None:
            lines.append(f"  expected: {_indented(self.expected, 4)}")
        if self.hint is not None:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)

    def sentence(self) -> str:
        """What it says in one line, without the hint."""
        parts = [
            self.what,
            f"got {self.got}" if self.got else "",
            f"expected {self.expected}" if self.expected else "",
        ]
        return "; ".join(part for part in parts if part)


def _indented(text: str, by: int) -> str:
    """Lines after the first further right: a name with line breaks cannot pass for another part."""
    return text.replace("\n", "\n" + " " * by)


def _text(value: object) -> str:
    try:
        return str(value)
    except ValueError:  # a number of more digits than Python converts (sys.set_int_max_str_digits)
        return f"a {type(value).__name__} with a number too long to show"


class UsageError(DijiangError):
    """The call itself is wrong: a missing argument, a value out of range, an option that excludes another."""

    exit_code = 2


class CheckpointError(DijiangError):
    """A checkpoint folder that cannot be read as a DiJiang (or, for `convert`, a vanilla) model."""


class BundleError(DijiangError):
    """A bundle that is missing, incomplete, corrupt, of another version, or unsafe to open."""


class RunnerError(DijiangError):
    """A runtime that is absent, or that cannot run what it was given."""


class PositionError(RunnerError):
    """A sequence that would run past the last position that the model knows."""


class PromptError(DijiangError):
    """A prompt that nothing can be generated from: empty, not UTF-8, or not readable."""


class TextError(DijiangError):
    """A text that cannot be scored or learned from: empty, binary, too short, or with tokens that the model
    does not have."""


class SessionError(DijiangError):
    """A saved state that cannot be resumed: corrupt, or of another model."""


class ValidationMismatch(DijiangError):
    """Outputs differ from the recorded reference by more than the tolerance."""


class PluginError(DijiangError):
    """The kernels or the TensorRT plugin are not built, are stale or damaged, or cannot be built here."""


class KernelError(DijiangError):
    """The CUDA kernels' library refused a call, or is not one that can be used."""


class OutputError(DijiangError):
    """An output that cannot be written: it exists, its folder is read-only, or the disk is full."""
