"""The `dijiang-export` command: a group whose commands are imported when they are called.

`main` is the one place where failures become messages and exit codes:

    0 done    1 failed, or outputs differ    2 wrong usage    70 a defect in dijiang-export
    130 interrupted    141 nobody reads the output    143 terminated
"""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import click

from dijiang_engines.errors import DijiangError, UsageError
from dijiang_engines.printable import json_text
from dijiang_engines.version import __version__
from dijiang_export.commands.common import (
    COMPLETION_VARIABLE,
    PROGRAM,
    Output,
    declare_output_options,
    encoding_of,
)

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

# click 8.2 and newer; before, the help was printed without an error
_NoArguments = getattr(click.exceptions, "NoArgsIsHelpError", ())
DEBUG_VARIABLE = "DIJIANG_DEBUG"
EXIT_INTERNAL = 70  # EX_SOFTWARE of sysexits.h

# Name -> (module:attribute, one line of help). The line stands here so that `--help` imports no command.
COMMANDS = {
    "convert": ("convert:convert", "Turn a vanilla GPT-NeoX, LLaMA or OPT checkpoint into a DiJiang one."),
    "to-onnx": ("to_onnx:to_onnx", "Export a DiJiang checkpoint to a bundle of ONNX graphs."),
    "validate": ("validate:validate", "Replay a bundle's recorded cases and compare with PyTorch's results."),
    "generate": ("generate:generate", "Generate text from a bundle."),
    "serve": ("serve:serve", "Serve a bundle or an engine to many users, behind an OpenAI-compatible API."),
    "perplexity": ("perplexity:perplexity", "How well a bundle, engine or checkpoint predicts text."),
    "inspect": ("inspect:inspect", "Describe a checkpoint or a bundle and what it takes to run."),
    "build-plugin": ("build_plugin:build_plugin", "Compile the CUDA kernels and the TensorRT plugin."),
    "build-engine": ("build_engine:build_engine", "Build a TensorRT engine from a bundle, and validate it."),
    "doctor": ("doctor:doctor", "Say what works on this machine, what is missing, and how to get it."),
    "bench": ("bench.run:bench", "Measure a bundle's speed and memory on this machine."),
    "completion": ("completion:completion", "Print the completion script of a shell."),
}

# Which extra brings a module that may be absent.
EXTRAS = {
    "torch": "export", "transformers": "export", "onnx": "export", "onnx_ir": "export",
    "onnxscript": "export", "scipy": "export", "onnxruntime": "cpu", "openvino": "openvino",
    "tensorrt": "tensorrt", "polygraphy": "tensorrt", "cuda": "tensorrt", "matplotlib": "bench",
    "starlette": "serve", "uvicorn": "serve", "jinja2": "serve", "prometheus_client": "serve",
    "llguidance": "guided",
}  # fmt: skip


class LazyGroup(click.Group):
    """A group that imports a command's module when that command is wanted, and not for `--help`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order in which a user meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return the command `cmd_name`, or None if there is none of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        command = getattr(importlib.import_module(f"dijiang_export.commands.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does it, with a suggestion for a misspelt name."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            close = difflib.get_close_matches(args[0], COMMANDS, n=1, cutoff=0.5)
            meant = f"did you mean `{PROGRAM} {close[0]}`?" if close else f"see `{PROGRAM} --help`"
            raise _UnknownCommand(f"there is no command {args[0]!r}", ctx, meant)
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete command names from the table; click would import every command."""
        from click.shell_completion import CompletionItem

        found = [
            CompletionItem(n, help=text) for n, (_, text) in COMMANDS.items() if n.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The command list of `--help`, from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


class _UnknownCommand(click.UsageError):
    def __init__(self, message: str, ctx: click.Context, hint: str) -> None:
        super().__init__(message, ctx)
        self.hint = hint


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=f"Example: {PROGRAM} to-onnx && {PROGRAM} generate --prompt 'def main():'",
)
@declare_output_options
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
def cli() -> None:
    """Export DiJiang linear-attention models to ONNX, validate the result, and run it.

    Without a path the commands work on the small trained model that comes with the package.
    """


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; nothing but `SystemExit` on termination escapes.

    Args:
        args: what follows the program's name; by default sys.argv's.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that cannot show γ still gets its text
            stream.reconfigure(errors="backslashreplace")
    # Before `--json` has been parsed an error can already occur; look for it where it may stand.
    before_separator = arguments[: arguments.index("--")] if "--" in arguments else arguments
    output = Output(json="--json" in before_separator)
    instruction = os.environ.get(COMPLETION_VARIABLE) if args is None else None
    try:
        with _sigterm_unwinds():
            return _complete(instruction) if instruction else _invoke(arguments, output)
    except BaseException as error:  # noqa: BLE001 - the one place where failures become messages
        code = _report(error, output)
        _drop_unwritable_output()
        return code


def _open_closed_streams() -> None:
    """Closed standard descriptors (`>&-`) become ones that nothing can be read from or written to.

    Left closed, their numbers would go to the next files that are opened, and libraries print to these
    numbers. What is written to standard output then fails as it should; nobody misses what goes to standard
    error, so that is swallowed.
    """
    for number, mode in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, mode)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            stream = open(number, "w" if number else "r", encoding="utf-8", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)


def _complete(instruction: str) -> int:
    from click.shell_completion import shell_complete

    try:
        code = shell_complete(cli, {}, PROGRAM, COMPLETION_VARIABLE, instruction)
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"{COMPLETION_VARIABLE} is set, but not what a shell's completion sets beside it", got=error
        ) from error
    sys.stdout.flush()
    return code


def _invoke(arguments: list[str], output: Output) -> int:
    try:
        with cli.make_context(PROGRAM, arguments, obj=output) as ctx:
            result = cli.invoke(ctx)
    except click.exceptions.Exit as stop:
        result = stop.exit_code
    sys.stdout.flush()  # a reader that has gone, or a full disk, must be noticed while it can be reported
    return result if isinstance(result, int) else 0


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Let SIGTERM raise SystemExit in the block, so that temporary folders are removed on the way out."""

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    try:
        previous = signal.signal(signal.SIGTERM, terminate)
    except ValueError:  # not the main thread: signals are someone else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _report(error: BaseException, output: Output) -> int:
    """Print `error` on stderr as text or JSON; return the exit code."""
    if isinstance(error, BrokenPipeError):  # nobody reads any more: no message
        return 128 + signal.SIGPIPE
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        error = RuntimeError(str(error.code))
    debug = os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    if debug:
        import traceback

        traceback.print_exception(error)
    failure, code = _explain(error)
    try:
        if isinstance(error, _NoArguments) and not output.json:
            click.echo(error.ctx.get_help() if error.ctx else "", err=True)
            return code
        if output.json:
            record = {
                "type": type(error).__name__, "what": failure.what, "got": failure.got,
                "expected": failure.expected, "hint": failure.hint, "exit_code": code,
            }  # fmt: skip
            click.echo(json_text({"error": record}, encoding=encoding_of(sys.stderr)), err=True)
        else:
            click.echo(f"error: {failure}", err=True)
    except OSError:  # stderr is closed or full: the exit code still tells
        pass
    return code


def _drop_unwritable_output() -> None:
    """What stdout's buffer holds and cannot get rid of would fail once more, and louder, at exit."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)


def _explain(error: BaseException) -> tuple[DijiangError, int]:
    """Any failure as a `DijiangError` to print, and its exit code."""
    if isinstance(error, DijiangError):
        return error, error.exit_code
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return DijiangError("interrupted"), 128 + signal.SIGINT
    if isinstance(error, click.ClickException):
        return _explain_usage(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] in EXTRAS:
        module = str(error.name).partition(".")[0]
        hint = f"pip install '{PROGRAM}[{EXTRAS[module]}]'"
        if module == "torch":
            hint += "  (README.md says how to get the CPU build of PyTorch)"
        return DijiangError(f"this needs the Python package {module}, which is not here", hint=hint), 1
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_os_error(error), 1
    if isinstance(error, UnicodeEncodeError):  # from a library that takes no names but valid ones
        name = error.object[max(error.start - 40, 0) : error.end + 40]
        return DijiangError("a name is not valid text", got=name, hint="rename the file or folder"), 1
    if isinstance(error, MemoryError):
        return DijiangError("out of memory", hint="close other programs, or use a smaller model or batch"), 1
    summary = " ".join(f"{type(error).__name__}: {error}".split())
    if len(summary) > 400:
        summary = summary[:399] + "…"
    hint = f"this is a defect in {PROGRAM}; {DEBUG_VARIABLE}=1 shows the traceback to report"
    return DijiangError(f"internal error: {summary}", hint=hint), EXIT_INTERNAL


def _explain_usage(error: click.ClickException) -> DijiangError:
    if isinstance(error, _NoArguments):
        return DijiangError("a command is missing", hint=f"see `{PROGRAM} --help`")
    message = error.format_message().rstrip(".")
    hint = getattr(error, "hint", None)
    ctx = getattr(error, "ctx", None)
    if hint is None and ctx is not None:
        hint = f"see `{ctx.command_path} --help`"
    return DijiangError(message[:1].lower() + message[1:] if message[1:2].islower() else message, hint=hint)


def _explain_os_error(error: OSError) -> DijiangError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "make room, or write to another disk"
    elif error.errno == errno.EBADF and error.filename is None:
        return DijiangError("standard input or output is closed", hint="do not close it: > /dev/null")
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "check the permissions, or use another folder"
    else:
        hint = None
    reason = (error.strerror or os.strerror(error.errno or 0)).lower()
    where = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, (str, bytes)) else ""
    return DijiangError(f"{reason}{where}", hint=hint)
