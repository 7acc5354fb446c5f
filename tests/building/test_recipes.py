"""Recipes: those that come with the package, a user's own, and everything that can be wrong with one."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dijiang_engines.building.recipes import FOLDER, Recipe, load_recipe, recipe_names
from dijiang_engines.errors import UsageError
from dijiang_engines.formats.engine import Profiles
from dijiang_engines.formats.safe_files import LIMITS
from dijiang_export.cli import main
from dijiang_export.commands.build_engine import build_engine

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAMES = ["datacenter", "jetson-orin", "jetson-thor", "rtx", "rtx-portable"]


def test_the_names() -> None:
    assert recipe_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_of_the_package(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name and recipe.description and recipe.precisions
    written = tomllib.loads((FOLDER / f"{name}.toml").read_text())
    missing = {field.name for field in fields(Recipe)} - {"name", "architectures"} - set(written)
    assert missing == set(), "a recipe says everything itself, so that it can be copied and changed"
    assert recipe.profiles == Profiles(
        written["max_batch"], written["max_length"], written["opt_batch"], written["opt_length"]
    )


def test_help_names_every_recipe() -> None:
    option = next(p for p in build_engine.params if p.name == "recipe")
    assert all(name in str(option.to_info_dict()["help"]) for name in NAMES)


def test_boards_are_told_by_their_gpu() -> None:
    assert load_recipe("jetson-orin").architectures == (87,)
    assert load_recipe("jetson-thor").architectures == (101, 110)  # CUDA 12's and 13's number for it
    assert load_recipe("datacenter").architectures == ()
    assert load_recipe("rtx").architectures == (86, 89, 120)
    assert load_recipe("rtx-portable").architectures == (80, 86, 89, 120, 121)


def test_an_own_recipe(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text('max_batch = 2\nmax_length = 16\nopt_length = 8\nlayout = "two"\n')
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.layout, recipe.profiles) == ("small", "two", Profiles(2, 16, 1, 8))
    assert recipe.workspace_mb == Recipe("x").workspace_mb


def test_changes() -> None:
    recipe = load_recipe("datacenter")
    assert recipe.with_changes(max_batch=None, layout=None) == recipe
    changed = recipe.with_changes(max_batch=3, max_length=100)
    assert changed.profiles == Profiles(3, 100, 1, 100), "what is optimised for follows the largest down"
    assert recipe.with_changes(max_length=4096).opt_length == 512
    with pytest.raises(UsageError, match="opt_batch is larger than max_batch"):
        recipe.with_changes(opt_batch=4, max_batch=2)


# What can be wrong


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_batches = 4", "unknown keys"),
        ('name = "x"', "unknown keys"),
        ("[profile]\nmax_batch = 4", "unknown keys"),
        ("max_batch = 0", "max_batch is out of range"),
        ("max_batch = -1", "max_batch is out of range"),
        ("max_batch = 1.0", "max_batch is out of range"),
        ("max_batch = true", "max_batch is out of range"),
        ('max_length = "2048"', "max_length is out of range"),
        (f"max_length = {2**40}", "max_length is out of range"),
        (f"opt_length = {10**30}", "opt_length is out of range"),
        ("workspace_mb = 0", "workspace_mb is out of range"),
        ("workspace_mb = [1]", "workspace_mb is out of range"),
        ("optimization_level = 6", "optimization_level is out of range"),
        ("optimization_level = 2026-01-01", "optimization_level is out of range"),
        ("opt_batch = 9", "opt_batch is larger than max_batch"),
        ("opt_length = 4096", "opt_length is larger than max_length"),
        ('layout = "three"', "unknown layout"),
        ('layout = ["one"]', "unknown layout"),
        ("layout = {}", "unknown layout"),
        ("precisions = []", "unknown precision"),
        ('precisions = ["float8"]', "unknown precision"),
        ('precisions = ["float16", ["float32"]]', "unknown precision"),
        ('precisions = "float16"', "precisions in the recipe .* is not a list"),
        ("architectures = 87", "architectures in the recipe .* is not a list"),
        ('architectures = ["sm_87"]', "a GPU in architectures is out of range"),
        ("architectures = [8.7]", "a GPU in architectures is out of range"),
        ("description = 5", "description"),
        ("max_batch = ", "is not TOML"),
        ("max_batch = 1\nmax_batch = 2", "is not TOML"),
        ("a = " + "[" * 20_000, "nested too deeply"),
        ("#" * (LIMITS["recipe"] + 1), "too large"),
    ],
)
def test_a_bad_recipe(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=words) as info:
        load_recipe(str(path))
    assert len(str(info.value)) < 1000
    assert "mine" in str(info.value) or "layout" in text


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_bytes(b"max_batch = 1 # \xff")
    with pytest.raises(UsageError, match="is not TOML"):
        load_recipe(str(tmp_path / "x.toml"))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"x\.toml is missing"):
        load_recipe(str(tmp_path / "x.toml"))
    (tmp_path / "x.toml").mkdir()
    with pytest.raises(UsageError, match="is not an ordinary file") as info:
        load_recipe(str(tmp_path / "x.toml"))
    assert info.value.got == "a folder"


HOSTILE = {
    "dotted key": "a" + ".a" * 30_000 + " = 1",
    "dotted table": "[a" + ".a" * 30_000 + "]",
    "quoted dots": '"a"' + '."a"' * 15_000 + " = 1",
    "inline tables": "a = " + "{a = " * 10_000,
    "dotted inline": "a = {b" + ".b" * 30_000 + " = 1}",
    "400 digits": "max_batch = " + "9" * 400,
    "60,000 digits": "max_batch = " + "9" * 60_000,
    "hexadecimal": "max_batch = 0x" + "f" * 60_000,
    "hexadecimal in a list": "precisions = [0x" + "f" * 60_000 + "]",
    "infinity": "max_batch = inf",
    "a name of 60,000 letters": "a" * 60_000 + " = 1",
    "escapes": 'layout = "\\u001b[31mred\\u202e"',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_recipe_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(HOSTILE[kind])
    start = time.process_time()
    with pytest.raises(UsageError) as info:
        load_recipe(str(path))
    assert time.process_time() - start < 2
    assert len(str(info.value)) < 5000 and "\x1b" not in str(info.value) and "\u202e" not in str(info.value)


def test_a_recipe_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.toml")
    with pytest.raises(UsageError, match="is not an ordinary file") as info:
        load_recipe(str(tmp_path / "x.toml"))
    assert info.value.got == "a pipe"


@pytest.mark.parametrize("name", ["orin", "", "..", "../recipes/rtx", "RTX"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(UsageError, match="there is no recipe") as info:
        load_recipe(name)
    assert info.value.expected == ", ".join(NAMES)
    assert ".toml" in str(info.value.hint)


def test_from_the_command_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["build-engine", str(tmp_path), "--recipe", "orin"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: there is no recipe 'orin'\n")
    assert main(["build-engine", str(tmp_path), "--opt-batch", "9"]) == 2
    assert "opt_batch is larger than max_batch" in capfd.readouterr().err
    assert main(["build-engine", str(tmp_path), "--max-batch", "0"]) == 2


VALUES = st.one_of(
    st.integers(-3, 5000), st.booleans(), st.floats(), st.text(max_size=5), st.none(),
    st.lists(st.one_of(st.integers(0, 1000), st.sampled_from(["float32", "float16", "x"])), max_size=2),
)  # fmt: skip


@given(st.dictionaries(st.sampled_from([f.name for f in fields(Recipe) if f.name != "name"]), VALUES))
def test_any_values_make_a_recipe_or_a_usage_error(values: dict[str, Any]) -> None:
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    for name in ("precisions", "architectures"):  # load_recipe sees to it that these are lists
        if not isinstance(given.get(name, ()), tuple):
            del given[name]
    try:
        recipe = Recipe(name="any", **given)
    except UsageError:
        return
    assert 1 <= recipe.opt_batch <= recipe.max_batch and 1 <= recipe.opt_length <= recipe.max_length
    assert isinstance(recipe.max_batch, int) and recipe.layout in ("one", "two")
