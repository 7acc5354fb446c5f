"""Which library of the cache is loaded, and which never is."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.makers.plugin_cache import make_build

from dijiang_engines.errors import KernelError, PluginError
from dijiang_engines.kernels.library import Library
from dijiang_engines.plugin import cache as plugin_cache
from dijiang_engines.plugin.cache import KERNELS, find_kernels_library, find_tensorrt_library, runs_on


def refusal(major: int | None = None, cache: Path | None = None, architecture: int | None = None) -> str:
    def find() -> Path:
        if major is None:
            return find_kernels_library(architecture, cache)
        return find_tensorrt_library(major, () if architecture is None else (architecture,), cache)

    with pytest.raises(PluginError) as caught:
        find()
    assert "dijiang-export build-plugin" in str(caught.value.hint) or "chmod" in str(caught.value.hint)
    return str(caught.value)


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plugin_cache.cache_folder() == tmp_path / "dijiang-export/plugin"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative/folder"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert plugin_cache.cache_folder() == tmp_path / "home/.cache/dijiang-export/plugin"


def test_nothing_is_built(tmp_path: Path) -> None:
    assert "the CUDA kernels are not built" in refusal(cache=tmp_path / "none")
    assert "--kernels-only" in refusal(cache=tmp_path)
    make_build(tmp_path, "a")
    message = refusal(8, tmp_path)
    assert "the plugin for TensorRT 8 is not built" in message
    assert "builds for TensorRT 10.13.3" in message


def test_the_newest_that_fits_is_found(tmp_path: Path) -> None:
    make_build(tmp_path, "old", tensorrt="8.6.1")
    new = make_build(tmp_path, "new", made="2026-02-01T00:00:00+00:00")
    for_orin = make_build(tmp_path, "orin", tensorrt=None, architectures=["sm_87", "compute_87"])
    assert find_kernels_library(cache=tmp_path) == new / KERNELS
    assert find_tensorrt_library(8, cache=tmp_path) == tmp_path / "old/libdijiang_tensorrt_8.so"
    assert find_tensorrt_library(10, (90,), tmp_path) == new / "libdijiang_tensorrt_10.so"
    # machine code before newer PTX; PTX where there is nothing else
    assert find_kernels_library(87, tmp_path) == for_orin / KERNELS
    assert find_kernels_library(89, tmp_path) == for_orin / KERNELS
    assert find_kernels_library(120, tmp_path) == new / KERNELS
    assert "expected: sm_80" in refusal(cache=tmp_path, architecture=80)


@pytest.mark.parametrize(
    ("names", "architecture", "runs"),
    [
        (("sm_90",), 90, True), (("sm_90",), 89, False), (("sm_80",), 87, False), (("sm_120",), 121, False),
        (("compute_90",), 90, True), (("compute_90",), 120, True), (("compute_90",), 89, False),
        ((), 90, False),
    ],
)  # fmt: skip
def test_what_runs_where(names: tuple[str, ...], architecture: int, runs: bool) -> None:
    assert runs_on(names, architecture) is runs


def test_stale_builds_are_not_loaded(tmp_path: Path) -> None:
    make_build(tmp_path, "a", sources="0" * 64)
    make_build(tmp_path, "b", version="0.0.1")
    assert "stale" in refusal(cache=tmp_path)
    assert "stale" in refusal(10, tmp_path)
    current = make_build(tmp_path, "c", made="2025-01-01T00:00:00+00:00")
    assert find_kernels_library(cache=tmp_path) == current / KERNELS


@pytest.mark.parametrize("damage", ["changed", "longer", "absent"])
def test_a_library_that_changed_is_not_loaded(damage: str, tmp_path: Path) -> None:
    path = make_build(tmp_path, "a") / KERNELS
    if damage == "absent":
        path.unlink()
    else:
        path.write_text(path.read_text().upper() if damage == "changed" else path.read_text() + " ")
    message = refusal(cache=tmp_path)
    assert str(path) in message
    assert "--force" in message
    find_tensorrt_library(10, cache=tmp_path)  # the other one is what was built


@pytest.mark.parametrize("which", ["a", "."])
def test_a_folder_that_others_can_write_to_is_not_trusted(which: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    make_build(cache, "a")
    (cache / which).chmod(0o777)
    assert "everybody may write to" in refusal(cache=cache)


def test_a_folder_of_another_user_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_build(tmp_path, "a")
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(plugin_cache.os, "getuid", lambda: owner + 1)
    if owner == 0:  # root's folders are always trusted
        assert find_kernels_library(cache=tmp_path).exists()
    else:
        assert "belongs to another user" in refusal(cache=tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2}, {"libraries": []}, {"libraries": {"../evil.so": {"sha256": "0"}}},
        {"libraries": {KERNELS: {}}}, {"tensorrt": "ten"}, {"architectures": None}, {"cuda": ...},
    ],
    ids=str,
)  # fmt: skip
def test_a_manifest_that_is_not_ours_is_passed_over(change: dict[str, Any], tmp_path: Path) -> None:
    folder = make_build(tmp_path, "a")
    path = folder / plugin_cache.MANIFEST
    data = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))
    with pytest.raises(PluginError, match="does not describe a build"):
        plugin_cache.read_manifest(folder)
    assert "not built" in refusal(cache=tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"null"])
def test_a_broken_manifest_is_passed_over(content: bytes, tmp_path: Path) -> None:
    folder = make_build(tmp_path, "a")
    (folder / plugin_cache.MANIFEST).write_bytes(content)
    assert plugin_cache.built_plugins(tmp_path) == []


def test_any_value_of_a_manifest_may_be_anything(tmp_path: Path) -> None:
    """Each value in turn replaced by others: refused, or a build that can be asked everything."""
    path = make_build(tmp_path, "a") / plugin_cache.MANIFEST
    whole = json.loads(path.read_text())
    odd: list[Any] = [None, True, 0, -1, 1e308, 10**39, "", "²", "\x1b[31m", "x" * 100_000]
    odd += [[], [1], {}, {"a": 1}, ["sm_²"], ...]
    paths = [(key,) for key in whole]
    paths += [("libraries", KERNELS), ("libraries", KERNELS, "sha256"), ("architectures", 0)]
    for where in paths:
        for value in odd:
            data = json.loads(json.dumps(whole))
            inner = data
            for step in where[:-1]:
                inner = inner[step]
            if value is ...:
                del inner[where[-1]]
            else:
                inner[where[-1]] = value
            path.write_text(json.dumps(data))
            for build in plugin_cache.built_plugins(tmp_path):
                assert build.is_current() in (True, False)
                assert runs_on(build.architectures, 90) in (True, False)
                assert build.tensorrt_major is None or build.tensorrt_major >= 0
            for major, architectures in ((None, ()), (None, (90,)), (10, (90, 89))):
                with suppress(PluginError):
                    plugin_cache._find(KERNELS, major, architectures, tmp_path)


@pytest.mark.parametrize(
    "content",
    [b'{"format": 1' + b"9" * 400 + b"}", b"[" * 100_000, b'{"a": ' * 5_000, b"1," * 2**19, b" " * 2**21],
    ids=["digits", "lists", "objects", "values", "size"],
)
def test_a_hostile_manifest_is_passed_over(content: bytes, tmp_path: Path) -> None:
    folder = make_build(tmp_path, "a")
    (folder / plugin_cache.MANIFEST).write_bytes(content)
    assert plugin_cache.built_plugins(tmp_path) == []


def test_pipes_are_not_waited_for(tmp_path: Path) -> None:
    folder = make_build(tmp_path, "a")
    for name in (KERNELS, plugin_cache.MANIFEST):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        assert ("not an ordinary file" if name == KERNELS else "not built") in refusal(cache=tmp_path)
    with pytest.raises(KernelError, match="is not an ordinary file"):
        Library(folder / KERNELS)


def test_the_hash_is_of_what_is_compiled(tmp_path: Path) -> None:
    def write(name: str, text: str) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return plugin_cache.source_hash(tmp_path)

    seen = [write("CMakeLists.txt", "a"), write("kernels/decode/a.cu", "x"), write("kernels/b.cu", "x")]
    seen += [write("kernels/b.cu", "y"), write("include/dijiang/kernels.h", ""), write("exports/k.map", "")]
    assert len(set(seen)) == len(seen)
    same = {write("tests/driver.cpp", "x"), write("kernels/a.o", "x"), write("README.md", "x"), seen[-1]}
    assert len(same) == 1
    (tmp_path / "kernels/b.cu").rename(tmp_path / "kernels/c.cu")
    assert plugin_cache.source_hash(tmp_path) not in seen


def test_this_checkout_has_sources() -> None:
    sources = plugin_cache.plugin_sources()
    names = {path.relative_to(sources).as_posix() for path in plugin_cache.source_files()}
    assert {"CMakeLists.txt", "cmake/Compile.cmake", "include/dijiang/kernels.h"} <= names
    assert not [name for name in names if name.startswith("tests/")]
