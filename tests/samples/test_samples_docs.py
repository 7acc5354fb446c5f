"""Pages under samples/ are true: commands and options exist, links lead somewhere, messages are said."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import click
import pytest
from support.paths import ROOT

from dijiang_export.cli import cli

PAGES = ("samples/README.md", "samples/jetson.md", "samples/cpp/README.md")


@cache
def text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    """The words of every command in a page's bash blocks, and of every inline one of more than a name."""
    found: list[list[str]] = []
    for block in re.findall(r"^```bash\n(.*?)^```", text(page), re.DOTALL | re.MULTILINE):
        for line in re.sub(r"\|\n\s*", "| ", block).splitlines():
            found += [shlex.split(part) for part in re.split(r" \| ", line)]
    for inline in re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text(page), flags=re.DOTALL)):
        if re.match(r"(dijiang-export|build-\w+|validate|generate|bench|to-onnx|pip|sudo) ", inline):
            found.append(shlex.split(inline))
    return found


ALL = [(page, words) for page in PAGES for words in commands(page)]


@cache
def help_of(*command: str) -> str:
    done = subprocess.run([sys.executable, *command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def options(words: list[str]) -> set[str]:
    return {word.split("=")[0] for word in words if re.match(r"-{1,2}[a-z]", word)}


def command_names() -> list[str]:
    return cli.list_commands(click.Context(cli))


def known_options(name: str) -> set[str]:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None, name
    if isinstance(command, click.Group):  # `bench` without a command is `bench run`
        command = command.commands["run"]
    return {option for parameter in command.params for option in parameter.opts}


def test_commands_of_every_kind_are_there() -> None:
    programs = {Path(words[0]).name for _, words in ALL}
    assert {"dijiang-export", "python", "cmake", "dijiang_generate", "pip", "sudo"} <= programs
    used = {words[1] for _, words in ALL if words[0] == "dijiang-export"}
    assert {"to-onnx", "build-plugin", "build-engine", "validate", "generate", "bench", "doctor"} <= used


@pytest.mark.parametrize(("page", "words"), ALL, ids=[f"{page}: {' '.join(w)}" for page, w in ALL])
def test_a_command_and_its_options_exist(page: str, words: list[str]) -> None:
    program = Path(words[0]).name
    if program == "dijiang-export":
        assert options(words[2:]) <= known_options(words[1])
    elif program in command_names():
        assert options(words[1:]) <= known_options(program)
    elif program == "python":
        assert options(words) <= set(re.findall(r"--[a-z-]+", help_of(str(ROOT / words[1]))))
    elif program == "dijiang_generate":
        shown = (ROOT / "samples/cpp/options.cpp").read_text(encoding="utf-8")
        assert options(words) <= set(re.findall(r"^  (--[a-z-]+)", shown, re.MULTILINE))
    elif program == "cmake" and "-S" in words:
        sources = words[words.index("-S") + 1].removeprefix("dijiang-export/")
        lists = (ROOT / sources / "CMakeLists.txt").read_text(encoding="utf-8")
        assert all(word[2:].split("=")[0] in lists for word in words if word.startswith("-D"))
    elif program == "pip":
        known = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        extras = [extra for word in words for extra in re.findall(r"\[(.*)\]", word)]
        assert all(f"\n{extra} = [" in known for group in extras for extra in group.split(","))
    else:
        system = {"cmake", "cat", "dpkg", "grep", "rsync", "sudo", "python3", "source", "printf"}
        assert program in system


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page: str) -> None:
    folder = (ROOT / page).parent
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text(page)):
        assert (folder / target).exists(), target
    for target in re.findall(r"`((?:samples|tests|docs|plugins)/[\w./-]*\w)`", text(page)):
        assert (ROOT / target).exists(), target
    assert max(map(len, text(page).splitlines())) < 200


def test_every_sample_is_in_the_list() -> None:
    listed = text("samples/README.md")
    for path in (ROOT / "samples").iterdir():
        if path.name != "README.md" and not path.name.startswith(("_", ".")):
            assert f"]({path.name}" in listed, path.name


def test_recipes_and_architectures_are_those_of_the_package() -> None:
    page = text("samples/jetson.md")
    recipes = ROOT / "engines/dijiang_engines/building/recipes"
    for recipe, number in (("jetson-orin", 87), ("jetson-thor", 110)):
        values = (recipes / f"{recipe}.toml").read_text(encoding="utf-8")
        assert str(number) in values
        assert f"| sm_{number} | `{recipe}` |" in page
    orin = (ROOT / "engines/dijiang_engines/building/recipes/jetson-orin.toml").read_text(encoding="utf-8")
    length = re.search(r"max_length = (\d+)", orin)
    assert length is not None
    assert "max_batch = 1\n" in orin  # "one sequence, and prompts in pieces of ..."
    assert f"one sequence, and prompts in pieces of {length[1]} tokens" in page


def test_messages_in_the_table_are_said() -> None:
    """Each part of a message between what varies is a text in the code."""
    sources = [*ROOT.glob("engines/dijiang_engines/**/*.py"), *ROOT.glob("samples/cpp/*.cpp")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    table = text("samples/jetson.md").partition("## What errors say")[2]
    messages = re.findall(r"^\| (?!message|---)(.*?) \|", table, re.MULTILINE)
    assert len(messages) > 10
    varying = r"TensorRT \d+(?:\.\d+)*|jetson-\w+|signal \d+|, |: |(?<=another) TensorRT|`[^`]*`"
    for message in messages:
        if "shared libraries" in message:
            continue  # the system's loader says that
        for part in filter(None, (part.strip() for part in re.split(varying, message))):
            if part not in ("GPU", "plugin"):
                assert part in code, f"{part!r} of {message!r}"
