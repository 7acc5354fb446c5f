"""The command line with streams that are closed or full, locales that know no Unicode, and odd file names."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.makers.toy_bundle import make_bundle

PROGRAM = [sys.executable, "-m", "dijiang_export"]
POSIX = {"LC_ALL": "POSIX", "LANG": "", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("streams") / "toy.bundle"
    make_bundle(folder)
    return folder


def shell(words: list[str | bytes], redirections: str = "", **env: str) -> subprocess.CompletedProcess[bytes]:
    """The program through a shell, which can close streams."""
    environment = os.environ | {"HOME": "/nonexistent"} | env
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", *PROGRAM, *words]
    return subprocess.run(command, capture_output=True, env=environment, timeout=120, check=False)


MANY = """
import base64, json, os, sys, tempfile
from dijiang_export import cli
commands = [[os.fsdecode(base64.b64decode(word)) for word in words] for words in json.load(sys.stdin)]
results = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
for name in {words[0] for words in commands}:  # imported before, so that each fork need not
    cli.main([name, "--help"])
def run(words):
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            code = cli.main(words)
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        texts = [os.pread(file.fileno(), 1 << 20, 0) for file in (out, err)]
    return code, *(base64.b64encode(text).decode() for text in texts)
os.write(results, json.dumps([run(words) for words in commands]).encode())
"""


def fresh_forks(commands: list[list[str | bytes]], **env: str) -> list[subprocess.CompletedProcess[bytes]]:
    """Each command in a process of its own with streams of its own, forked from one that has imported all."""
    coded = [[base64.b64encode(os.fsencode(word)).decode() for word in words] for words in commands]
    environment = os.environ | {"HOME": "/nonexistent"} | env
    done = subprocess.run(
        [sys.executable, "-c", MANY], input=json.dumps(coded).encode(), env=environment,
        capture_output=True, timeout=300, check=True,
    )  # fmt: skip
    return [
        subprocess.CompletedProcess(words, code, *map(base64.b64decode, texts))
        for words, (code, *texts) in zip(commands, json.loads(done.stdout), strict=True)
    ]


def is_clean(done: subprocess.CompletedProcess[bytes]) -> bool:
    return done.returncode != 70 and b"Traceback" not in done.stderr and b"Exception" not in done.stderr


BRIEF = ["--threads", "1", "--seconds", "0.01", "--length", "8", "--batch", "1", "--position", "9"]
RESULTS = (
    ["--help"], ["--version"], ["completion", "bash"], ["generate", "--help"], ["bench", "--help"],
    ["inspect", "TOY"], ["inspect", "TOY", "--json"], ["generate", "TOY", "-p", "a", "-n", "2"],
    ["generate", "TOY", "-p", "a", "-n", "2", "--json"],
)  # fmt: skip


@pytest.mark.parametrize("words", RESULTS, ids=" ".join)
def test_a_result_that_cannot_be_printed_is_an_error(words: list[str], toy: Path) -> None:
    for redirection in (">&-", ">/dev/full"):
        done = shell([str(toy) if word == "TOY" else word for word in words], redirection)
        assert is_clean(done), done.stderr
        assert done.returncode == 1
        message = done.stderr.decode()
        if "--json" in words:
            message = json.loads(message)["error"]["what"]
        assert ("closed" if redirection == ">&-" else "no space left") in message


def test_errors_keep_their_exit_codes_without_any_stream(toy: Path) -> None:
    assert shell(["nonsense"], ">&- 2>&-").returncode == 2
    assert shell(["inspect", "/nonexistent"], ">&- 2>&-").returncode == 1
    assert shell(["inspect", "/nonexistent"], "2>/dev/full").returncode == 1
    done = shell(["generate", str(toy), "-p", "a", "-n", "2"], "2>&-")
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout
    done = shell(["generate", str(toy), "-p", "a", "-n", "2"], "2>/dev/full <&-")
    assert done.returncode == 0 and done.stdout


def test_a_prompt_from_a_closed_standard_input(toy: Path) -> None:
    done = shell(["generate", str(toy), "-"], "<&-")
    assert is_clean(done) and done.returncode == 1
    assert b"standard input" in done.stderr


def test_a_closed_number_does_not_go_to_a_file(toy: Path, tmp_path: Path) -> None:
    """What libraries print to number 1 must not land in what is written."""
    code = (
        "import os, sys\nfrom dijiang_export import cli\n"
        "def work(ctx):\n"
        "    with open(sys.argv[2], 'wb'):\n"
        "        for number in (0, 1, 2):\n"
        "            try: os.write(number, b'lost')\n"
        "            except OSError: pass\n"
        "cli.cli.invoke = work\n"
        "sys.exit(cli.main(['inspect', sys.argv[1]]))"
    )
    target = tmp_path / "out"
    command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code, str(toy), str(target)]
    subprocess.run(command, check=False, timeout=60)
    assert target.read_bytes() == b""


def test_completion_without_a_shell() -> None:
    for env in ({}, {"COMP_WORDS": "dijiang-export", "COMP_CWORD": "x"}):
        done = shell([], _DIJIANG_EXPORT_COMPLETE="bash_complete", **env)
        assert done.returncode == 2 and is_clean(done), done.stderr


# -- locales ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("env", [POSIX, {"LC_ALL": "C"}, {"PYTHONUTF8": "1"}], ids=["posix", "c", "utf8"])
def test_a_prompt_is_utf8_in_any_locale(env: dict[str, str], toy: Path) -> None:
    done = shell(["generate", str(toy), "-p", "é 日".encode(), "-n", "1", "--json"], **env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["completions"][0]
    assert found["prompt"] == "é 日"
    assert found["prompt_tokens"] == 1 + 1 + 3  # é is one token of this tokenizer
    for word in ("-p", "--stop"):
        given = [] if word == "-p" else ["-p", "a"]
        done = shell(["generate", str(toy), *given, word, b"caf\xe9"], **env)
        assert done.returncode == 1
        assert b"not UTF-8" in done.stderr and is_clean(done)


@pytest.mark.parametrize("env", [POSIX, {"PYTHONUTF8": "1"}], ids=["posix", "utf8"])
def test_odd_file_names_are_shown_and_stay_json(env: dict[str, str], tmp_path: Path) -> None:
    names = (b"caf\xe9 \x1b[31m\n\xe2\x80\xae.toml", "日本😀".encode())
    commands: list[list[str | bytes]] = [
        [*words, os.path.join(os.fsencode(tmp_path), name), *option]
        for name in names
        for words in (["inspect"], ["validate"], ["build-engine"], ["bench", "report"])
        for option in ([], ["--json"])
    ]
    for words, done in zip(commands, fresh_forks(commands, **env), strict=True):
        assert done.returncode == 1 and is_clean(done), done
        assert b"\x1b" not in done.stderr and "\u202e".encode() not in done.stderr
        if words[-1] == "--json":
            error = json.loads(done.stderr)["error"]
            assert error["exit_code"] == 1 and error["what"]
        else:
            assert done.stderr.startswith(b"error: ")


def test_a_bundle_of_such_a_name_opens_in_json(tmp_path: Path) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"b\xff\x1b\xe2\x80\xae")
    make_bundle(tmp_path / "plain")
    (tmp_path / "plain").rename(os.fsdecode(folder))
    for env in (POSIX, {"PYTHONUTF8": "1"}):
        done = shell(["inspect", folder, "--json"], **env)
        assert done.returncode == 0, done.stderr
        assert os.fsencode(json.loads(done.stdout)["path"]) == folder or env is POSIX
        shown = shell(["inspect", folder], **env)
        assert shown.returncode == 0 and b"\x1b" not in shown.stdout
        done = shell(["generate", folder, "-p", "a"], **env)  # the libraries below take no such names
        assert done.returncode in (0, 1) and is_clean(done), done.stderr


@pytest.mark.parametrize("env", [POSIX, {"PYTHONUTF8": "1"}], ids=["posix", "utf8"])
def test_a_bundle_of_such_a_name_is_measured_or_refused(env: dict[str, str], tmp_path: Path) -> None:
    folder = os.path.join(os.fsencode(tmp_path), b"b\xff\x1b\xe2\x80\xae")
    make_bundle(tmp_path / "plain")
    (tmp_path / "plain").rename(os.fsdecode(folder))
    done = shell(["bench", folder, *BRIEF], **env)
    assert done.returncode in (0, 1) and is_clean(done), done.stderr


# -- files that are not files ------------------------------------------------------------------------------

FILE_ARGUMENTS = (
    ["bench", "report", "X"], ["bench", "kernels", "--from", "X"],
    ["build-engine", "TOY", "--recipe", "X.toml"], ["generate", "TOY", "-f", "X"],
    ["generate", "TOY", "-p", "a", "--session", "X"],
    ["generate", "TOY", "-p", "a", "--tokenizer", "X"], ["inspect", "X"], ["validate", "X"],
)  # fmt: skip


@pytest.mark.parametrize("words", FILE_ARGUMENTS, ids=" ".join)
@pytest.mark.parametrize("kind", ["folder", "pipe", "absent", "empty"])
def test_what_is_no_file_is_one_message(words: list[str], kind: str, toy: Path, tmp_path: Path) -> None:
    if kind == "pipe" and "generate" in words:
        pytest.skip("a prompt may come through a pipe; sessions and tokenizers have tests of their own")
    for name in ("X", "X.toml"):
        if kind == "folder":
            (tmp_path / name).mkdir()
        elif kind == "pipe":
            os.mkfifo(tmp_path / name)
        elif kind == "empty":
            (tmp_path / name).touch()
    given = [str(toy) if w == "TOY" else str(tmp_path / w) if w.startswith("X") else w for w in words]
    code = main_code(given)
    assert code in (1, 2) or (kind == "empty" and "-f" in words)


def main_code(words: list[str]) -> int:
    from dijiang_export.cli import main

    return main(words)
