"""Engine folders that are damaged, of another version or hostile: refused before TensorRT sees them."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.fakes.runner import toy_case, write_reference
from support.makers.engine_folders import edit_manifest, facts, write_engine
from support.makers.toy_bundle import SPEC, ToyModel

from dijiang_engines.errors import BundleError, DijiangError
from dijiang_engines.formats.engine import (
    EngineFolder,
    Profiles,
    open_engine,
    write_engine_manifest,
)  # fmt: skip
from dijiang_engines.formats.file_table import ENGINE_MANIFEST
from dijiang_engines.formats.open import open_model
from dijiang_export.cli import main


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    return write_engine(tmp_path / "toy.engine")


def test_a_right_folder(engine: Path) -> None:
    opened = open_engine(engine)
    assert (opened.spec, opened.dtype, opened.all_logits, opened.name) == (SPEC, "float32", False, "toy")
    assert opened.profiles == Profiles(max_batch=4, max_length=64, opt_batch=1, opt_length=16)
    assert opened.made_for.compute_capabilities == (90,)
    assert (opened.prefill.file, opened.prefill.profile) == ("model.plan", 0)
    assert (opened.step.file, opened.step.profile) == ("model.plan", 1)
    assert opened.config_path == engine / "config.json"
    assert opened.tokenizer_path is None and opened.reference_path is None
    assert opened.verified_plan("model.plan") == engine / "model.plan"


def test_the_other_layout(tmp_path: Path) -> None:
    opened = open_engine(write_engine(tmp_path / "e", "two", logits="all"))
    assert (opened.prefill.file, opened.prefill.profile) == ("prefill.plan", 0)
    assert (opened.step.file, opened.step.profile) == ("step.plan", 0)
    assert opened.all_logits and opened.plans == ("prefill.plan", "step.plan")


def test_bundles_and_engines_are_told_apart(engine: Path, toy: tuple[Path, ToyModel], tmp_path: Path) -> None:
    assert isinstance(open_model(engine), EngineFolder)
    assert open_model(toy[0]).name == "toy"
    with pytest.raises(BundleError, match="there is no bundle"):
        open_model(tmp_path / "nothing")
    with pytest.raises(BundleError, match="there is no engine") as info:
        open_engine(toy[0])
    assert "build-engine" in str(info.value)


# Damage


def test_a_plan_that_was_changed_is_refused(engine: Path) -> None:
    plan = engine / "model.plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b"\1")
    with pytest.raises(BundleError, match="is corrupt") as info:
        open_engine(engine)
    assert info.value.got == hashlib.sha256(plan.read_bytes()).hexdigest()
    assert "build-engine" in str(info.value.hint)


def test_a_plan_that_was_not_looked_at_yet_is_looked_at_before_it_is_used(engine: Path) -> None:
    plan = engine / "model.plan"
    plan.write_bytes(bytes(999) + b"\1")
    opened = open_engine(engine, verify=False)
    with pytest.raises(BundleError, match="is corrupt"):
        opened.verified_plan("model.plan")


@pytest.mark.parametrize("length", [0, 1, 999, 1001])
def test_a_plan_of_another_size_is_refused(engine: Path, length: int) -> None:
    (engine / "model.plan").write_bytes(bytes(length))
    with pytest.raises(BundleError, match="wrong size") as info:
        open_engine(engine, verify=False)
    assert (info.value.got, info.value.expected) == (f"{length} bytes", "1000 bytes")


@pytest.mark.parametrize("name", ["model.plan", "config.json"])
def test_a_missing_file(engine: Path, name: str) -> None:
    (engine / name).unlink()
    with pytest.raises(BundleError, match="is missing"):
        open_engine(engine)


def test_links_and_devices_are_refused(engine: Path, tmp_path: Path) -> None:
    plan = engine / "model.plan"
    other = tmp_path / "other"
    plan.rename(other)
    plan.symlink_to(other)
    with pytest.raises(BundleError, match="symbolic link"):
        open_engine(engine)
    plan.unlink()
    os.link(other, plan)
    with pytest.raises(BundleError, match="hard link"):
        open_engine(engine)
    plan.unlink()
    os.mkfifo(plan)
    with pytest.raises(BundleError, match="not an ordinary file"):
        open_engine(engine)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "not valid JSON"),
        (b"[]", "bad or missing value"),
        (b'{"format": ', "not valid JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "same key twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b" " * (17 << 20), "too large"),
    ],
)
def test_a_manifest_that_is_none(engine: Path, data: bytes, words: str) -> None:
    (engine / ENGINE_MANIFEST).write_bytes(data)
    with pytest.raises(BundleError, match=words):
        open_engine(engine)


# A manifest that lies

BAD = [
    (("format",), "dijiang-bundle", "not an engine's"),
    (("format",), ["dijiang-engine"], "not an engine's"),
    (("format_version",), 2, "format version"),
    (("format_version",), 0, "format version"),
    (("format_version",), True, "format version"),
    (("dtype",), "float8", "dtype"),
    (("dtype",), ["float32"], "dtype"),
    (("logits",), {}, "logits"),
    (("layout",), "three", "layout"),
    (("layout",), ["one"], "layout"),
    (("layout",), "two", "files"),
    (("spec",), None, "spec"),
    (("spec", "vocab_size"), "260", "vocab_size"),
    (("spec", "vocab_size"), 2**40, "vocab_size"),
    (("spec", "num_layers"), 0, "num_layers"),
    (("spec", "vocab_size"), 261, "source.spec_sha256"),
    (("profiles",), None, "profiles"),
    (("profiles", "max_batch"), 0, "profiles.max_batch"),
    (("profiles", "max_batch"), True, "profiles.max_batch"),
    (("profiles", "max_length"), 2**31, "profiles.max_length"),
    (("profiles", "max_length"), 64.0, "profiles.max_length"),
    (("profiles", "opt_batch"), "1", "profiles.opt_batch"),
    (("made_for",), [], "made_for"),
    (("made_for", "tensorrt"), 8.6, "made_for.tensorrt"),
    (("made_for", "gpu"), "", "made_for.gpu"),
    (("made_for", "gpu"), "x" * 1000, "made_for.gpu"),
    (("made_for", "compute_capability"), "90", "made_for.compute_capability"),
    (("made_for", "compute_capability"), 10**9, "made_for.compute_capability"),
    (("made_for", "plugin_sources"), None, "made_for.plugin_sources"),
    (("made_for", "runtime"), "tensorrt-lean", "made_for.runtime"),
    (("made_for", "runtime"), ["tensorrt"], "made_for.runtime"),
    (("made_for", "graphs"), {}, "made_for.graphs"),
    (("made_for", "runtime"), "tensorrt-rtx", "made_for.compute_capabilities"),
    (("source",), None, "source"),
    (("source", "name"), 5, "source.name"),
    (("source", "weights_sha256"), None, "source.weights_sha256"),
    (("files",), {}, "files"),
    (("files",), {str(i): {} for i in range(1001)}, "files"),
    (("files", "model.plan"), "0" * 64, "files.model.plan"),
    (("files", "model.plan", "sha256"), "A" * 64, "files.model.plan"),
    (("files", "model.plan", "bytes"), -1, "files.model.plan"),
    (("files", "model.plan", "bytes"), 10**18, "wrong size"),
    (("reference",), {"cases": ["short"]}, "files"),
    (("reference",), "short", "reference"),
    (("quantisation",), [], "quantisation"),
    (("quantisation",), {"weight_format": "int4"}, "quantisation"),
]


@pytest.mark.parametrize(("path", "value", "words"), BAD)
def test_a_bad_value_is_named(engine: Path, path: tuple[str, ...], value: Any, words: str) -> None:
    edit_manifest(engine, path, value)
    with pytest.raises(BundleError, match=words.replace(".", r"\.")) as info:
        open_engine(engine)
    text = str(info.value)
    assert len(text) < 1000
    if path[0] != "spec" and words != "wrong size":
        assert "manifest.json" not in text and "export the checkpoint" not in text


@pytest.mark.parametrize(
    "name",
    ["../model.plan", "/etc/passwd", "sub/model.plan", "..", ".", "", "a\0b", "a\nb", "engine.json",
     "manifest.json", "C:\\x", "x" * 300],
)  # fmt: skip
def test_names_that_could_leave_the_folder(engine: Path, name: str) -> None:
    edit_manifest(engine, ("files", name), {"sha256": "0" * 64, "bytes": 0})
    with pytest.raises(BundleError, match="file name"):
        open_engine(engine)


def test_a_newer_format_says_to_update(engine: Path) -> None:
    edit_manifest(engine, ("format_version",), 2)
    with pytest.raises(BundleError) as info:
        open_engine(engine)
    assert info.value.hint == "update dijiang-export"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_stands_in_the_manifest(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any value in any place: opened, or refused with words; never another exception."""
    folder = write_engine(tmp_path_factory.mktemp("any") / "e")
    manifest = json.loads((folder / ENGINE_MANIFEST).read_text())
    places = [(a,) for a in manifest]
    places += [(a, b) for a, inner in manifest.items() if isinstance(inner, dict) for b in inner]
    edit_manifest(folder, data.draw(st.sampled_from(places)), data.draw(JSON))
    try:
        open_engine(folder)
    except BundleError as refused:
        message = str(refused)
    else:
        message = "right"
    assert 0 < len(message) < 2000


# Recorded cases


def with_cases(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model.plan").write_bytes(b"plan")
    write_reference(
        folder / "reference.safetensors", {"short": toy_case(ToyModel.random(SPEC), [5, 3], [0, 2])}
    )
    write_engine_manifest(folder, facts(reference={"file": "reference.safetensors", "cases": ["short"]}))
    return folder


def test_the_recorded_cases(tmp_path: Path) -> None:
    opened = open_engine(with_cases(tmp_path / "e"))
    assert opened.cases == ["short"]
    np.testing.assert_array_equal(opened.reference().cases["short"].seq_lens, [5, 3])


def test_other_cases_than_the_manifest_says(tmp_path: Path) -> None:
    folder = with_cases(tmp_path / "e")
    edit_manifest(folder, ("reference", "cases"), ["long"])
    with pytest.raises(BundleError, match="other cases") as info:
        open_engine(folder).reference()
    assert (info.value.got, info.value.expected) == ("['short']", "['long']")


def test_damaged_cases(tmp_path: Path) -> None:
    folder = with_cases(tmp_path / "e")
    path = folder / "reference.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match="is corrupt"):
        open_engine(folder).reference()


def test_no_cases(engine: Path) -> None:
    with pytest.raises(BundleError, match="holds no recorded cases") as info:
        open_engine(engine).reference()
    assert "--cases short" in str(info.value)


# From the command line


@pytest.mark.parametrize("command", ["generate", "validate", "bench"])
def test_commands_say_it_in_one_message(
    engine: Path, command: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (engine / "model.plan").write_bytes(bytes(999) + b"\1")
    arguments = ["--prompt", "a"] if command == "generate" else []
    assert main([command, str(engine), *arguments]) == 1
    out, err = capfd.readouterr()
    assert out == "" and "Traceback" not in err
    assert err.startswith("error: ") and "is corrupt" in err and "\nhint: " in err


def test_errors_are_dijiang_errors() -> None:
    assert issubclass(BundleError, DijiangError) and BundleError.exit_code == 1
