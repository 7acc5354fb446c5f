"""The command line as a whole: its list of commands, its options, and how failures end."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from dijiang_engines.errors import BundleError, UsageError
from dijiang_export import cli as cli_module
from dijiang_export.cli import COMMANDS, EXIT_INTERNAL, cli, main
from dijiang_export.commands.common import Output, jsonable, output_options

Body = Callable[[Output], Any]


@pytest.fixture
def probe(monkeypatch: pytest.MonkeyPatch) -> Callable[[Body], None]:
    """Install a command `probe` that runs the given function on its `Output`."""

    def install(body: Body) -> None:
        @click.command()
        @output_options
        def probe(output: Output) -> Any:
            """Run."""
            return body(output)

        module = types.ModuleType("dijiang_export.commands._probe")
        module.probe = probe  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(COMMANDS, "probe", ("_probe:probe", "A probe."))

    return install


def raising(error: BaseException) -> Body:
    def body(_output: Output) -> None:
        raise error

    return body


def script(code: str, *arguments: str, prefix: str = "") -> list[str]:
    """A command line that runs `main` with a `probe` command whose body is `code`."""
    body = textwrap.indent(textwrap.dedent(code), "    ")
    program = f"""
import sys, types, click
{prefix}
from dijiang_export import cli
from dijiang_export.commands.common import output_options
@click.command()
@output_options
def probe(output):
{body}
module = sys.modules["dijiang_export.commands._probe"] = types.ModuleType("_probe")
module.probe = probe
cli.COMMANDS["probe"] = ("_probe:probe", "")
sys.exit(cli.main())
"""
    return [sys.executable, "-c", program, "probe", *arguments]


# The list of commands


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert [name for name in COMMANDS if f"  {name} " not in shown] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "Example" in shown
    assert f"dijiang-export {name}" in " ".join(shown.split())
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    if name != "completion":
        for one in command.commands.values() if isinstance(command, click.Group) else [command]:
            assert {"--json", "--quiet", "-q"} <= {opt for parameter in one.params for opt in parameter.opts}


def test_help_imports_no_command_and_nothing_heavy() -> None:
    code = (
        "import sys\nfrom dijiang_export.cli import main\nassert main(['--help']) == 0\n"
        "heavy = {'numpy', 'rich', 'torch', 'transformers', 'onnx', 'onnxruntime', 'tokenizers'}\n"
        "commands = {n for n in sys.modules if n.startswith('dijiang_export.commands.')}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert commands == {'dijiang_export.commands.common'}, commands\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from dijiang_engines.version import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dijiang-export {__version__}\n"


def test_python_dash_m() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dijiang_export", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout[:15]) == (0, "dijiang-export ")


# Wrong usage


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Commands:" in err


@pytest.mark.parametrize(
    ("arguments", "what", "hint"),
    [
        (["validat"], "there is no command 'validat'", "did you mean `dijiang-export validate`?"),
        (["xyzzy"], "there is no command 'xyzzy'", "see `dijiang-export --help`"),
        (
            ["completion", "tcsh"],
            "'tcsh' is not one of 'bash', 'zsh', 'fish'",
            "see `dijiang-export completion",
        ),
        (["completion"], "missing argument", "see `dijiang-export completion --help`"),
        (["--nonsense"], "no such option", "see `dijiang-export --help`"),
    ],
)
def test_usage_errors(arguments: list[str], what: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert what in err
    assert f"hint: {hint}" in err


def test_usage_error_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--json", "--nonsense"]) == 2
    error = json.loads(capsys.readouterr().err)["error"]
    assert error["exit_code"] == 2
    assert "--nonsense" in error["what"]


# Failures


def test_error_says_what_was_found_expected_and_to_do(
    probe: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    probe(raising(BundleError("the format is not known", got=7, expected=1, hint="export it again")))
    assert main(["probe"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: the format is not known\n  got: 7\n  expected: 1\nhint: export it again\n"


@pytest.mark.parametrize("arguments", [["--json", "probe"], ["probe", "--json"]])
def test_error_as_json(
    arguments: list[str], probe: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    probe(raising(BundleError("the format is not known", got=7, expected=1, hint="export it again")))
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err) == {
        "error": {
            "type": "BundleError", "what": "the format is not known", "got": "7", "expected": "1",
            "hint": "export it again", "exit_code": 1,
        }
    }  # fmt: skip


def no_module(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UsageError("top-k and greedy exclude each other"), 2, ["exclude"]),
        (click.UsageError("No."), 2, ["error: no"]),
        (KeyboardInterrupt(), 130, ["error: interrupted"]),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 1, ["no space left", "/x/y", "make room"]),
        (PermissionError(errno.EACCES, "Permission denied", "/x"), 1, ["permission denied: /x"]),
        (OSError(errno.EROFS, "Read-only file system", "/x"), 1, ["read-only", "another folder"]),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", b"/x"), 1, ["no such file", "/x"]),
        (MemoryError(), 1, ["out of memory"]),
        (no_module("torch"), 1, ["package torch", "pip install 'dijiang-export[export]'", "CPU build"]),
        (no_module("onnx.helper"), 1, ["package onnx,", "dijiang-export[export]"]),
        (no_module("onnxruntime"), 1, ["pip install 'dijiang-export[cpu]'"]),
        (no_module("frobnicate"), EXIT_INTERNAL, ["internal error: ModuleNotFoundError"]),
        (ZeroDivisionError("a\nb"), EXIT_INTERNAL, ["error: internal error: ZeroDivisionError: a b"]),
        (ZeroDivisionError(), EXIT_INTERNAL, ["hint: this is a defect", "DIJIANG_DEBUG=1"]),
        (ValueError("x" * 9999), EXIT_INTERNAL, ["xxx…"]),
        (SystemExit(3), 3, []),
        (SystemExit("odd"), EXIT_INTERNAL, ["odd"]),
    ],
)  # fmt: skip
def test_exit_codes_and_messages(
    error: BaseException,
    code: int,
    words: list[str],
    probe: Callable[[Body], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    probe(raising(error))
    assert main(["probe"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert [word for word in words if word not in err] == []
    assert "Traceback" not in err
    assert len(err.splitlines()) == (
        0 if isinstance(error, SystemExit) and code == 3 else 1 + ("hint:" in err)
    )


def test_debug_shows_the_traceback(
    probe: Callable[[Body], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    probe(raising(ZeroDivisionError("oh")))
    monkeypatch.setenv(cli_module.DEBUG_VARIABLE, "1")
    assert main(["probe"]) == EXIT_INTERNAL
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "in body" in err


def test_a_returned_number_is_the_exit_code(probe: Callable[[Body], None]) -> None:
    probe(lambda _output: 1)
    assert main(["probe"]) == 1
    probe(lambda _output: None)
    assert main(["probe"]) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_unwind(number: signal.Signals, code: int, tmp_path: Path) -> None:
    marker = tmp_path / "cleaned"
    body = f"""
        import time
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            open({str(marker)!r}, "w").close()
    """
    with subprocess.Popen(script(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert marker.exists()
    assert err == ("error: interrupted\n" if code == 130 else "")


def test_a_closed_pipe_is_no_error() -> None:
    body = "output.print_result('x' * 5_000_000, lambda: 'x' * 5_000_000)"
    # Without a buffer, Python forgets what a pipe has not taken, and sees no error.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    pipe = subprocess.PIPE
    with subprocess.Popen(script(body), stdout=pipe, stderr=pipe, env=environment) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 141
    assert err == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_disk_under_stdout_is_reported(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            script("output.print_result({'a': 1})"),
            stdout=full,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no space left on device\n")
    assert "Traceback" not in done.stderr


def test_an_encoding_without_the_letter_gets_an_escape() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    command = script("output.print_result(0, lambda: 'γ = 1')")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (0, "\\u03b3 = 1\n")


# Output


@pytest.mark.parametrize("arguments", [["-q", "probe"], ["probe", "--quiet"], ["probe", "-q"]])
def test_quiet_stops_logs_not_results(
    arguments: list[str], probe: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def body(output: Output) -> None:
        output.log("working")
        output.print_result({"a": 1}, lambda: "a is 1")

    probe(body)
    assert main(["probe"]) == 0
    assert capsys.readouterr() == ("a is 1\n", "working\n")
    assert main(arguments) == 0
    assert capsys.readouterr() == ("a is 1\n", "")


@pytest.mark.parametrize(
    "arguments", [["--json", "probe"], ["probe", "--json"], ["--json", "probe", "--json"]]
)
def test_json_before_and_after_the_command(
    arguments: list[str], probe: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    probe(lambda output: output.print_result({"a": float("nan")}, lambda: "never"))
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == {"a": "nan"}


def test_tables_are_not_cut_where_nobody_looks(
    probe: Callable[[Body], None], capsys: pytest.CaptureFixture[str]
) -> None:
    from rich.table import Table

    def body(output: Output) -> None:
        table = Table("name", "value")
        table.add_row("n" * 90, "[bold]v[/bold]" + "v" * 60)
        output.print_result({}, lambda: table)

    probe(body)
    assert main(["probe"]) == 0
    shown = capsys.readouterr().out
    assert "n" * 90 in shown
    assert "v" * 60 in shown
    assert "…" not in shown


@dataclass
class Point:
    x: float
    where: Path


def test_jsonable() -> None:
    value = {
        1: Point(float("inf"), Path("/a")),
        "b": (np.float32(0.5), np.int64(3), np.array([[1.0, float("-inf")]])),
        "c": {"y", "x"},
        "d": [True, None, "text"],
    }
    assert jsonable(value) == {
        "1": {"x": "inf", "where": "/a"},
        "b": [0.5, 3, [[1.0, "-inf"]]],
        "c": ["x", "y"],
        "d": [True, None, "text"],
    }
    with pytest.raises(TypeError, match="object has no JSON form"):
        jsonable(object())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_drawn_on_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    drawn = {}
    for kind, stream in {"terminal": Terminal(), "file": io.StringIO()}.items():
        monkeypatch.setattr(sys, "stderr", stream)
        output = Output()
        with output.progress("Writing weights", total=2**20, unit="bytes") as bar:
            bar.advance(2**20)
            with output.progress("inner", total=1) as inner:  # no second bar inside the first
                inner.advance()
            output.log("halfway [1/2]")
        drawn[kind] = stream.getvalue()
    assert "Writing weights" in drawn["terminal"]
    assert "1.0/1.0 MiB" in drawn["terminal"]
    assert "halfway [1/2]" in drawn["terminal"]
    assert "inner" not in drawn["terminal"]
    assert drawn["file"] == "halfway [1/2]\n"
    quiet = Terminal()
    monkeypatch.setattr(sys, "stderr", quiet)
    with Output(quiet=True).progress("Writing", total=1) as bar:
        bar.advance()
    assert quiet.getvalue() == ""


# Shell completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    shown = capsys.readouterr().out
    assert f"_DIJIANG_EXPORT_COMPLETE={shell}_complete" in shown
    assert "dijiang-export" in shown


@pytest.mark.parametrize(
    ("words", "position", "found"),
    [
        ("dijiang-export to", "1", ["to-onnx"]),
        ("dijiang-export -", "1", ["-q", "--quiet", "--json", "--version", "-h", "--help"]),
        ("dijiang-export completion ", "2", ["bash", "zsh", "fish"]),
    ],
)
def test_completion_answers(words: str, position: str, found: list[str]) -> None:
    environment = os.environ | {
        "_DIJIANG_EXPORT_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": position,
    }  # fmt: skip
    command = [sys.executable, "-m", "dijiang_export"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert [line.partition(",")[2] for line in done.stdout.splitlines()] == found
