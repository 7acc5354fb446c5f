"""`to-onnx` and `convert` take their output as an argument or as -o, and its permissions from the umask."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support.makers.checkpoints import neox

from dijiang_export.commands.convert import convert
from dijiang_export.commands.to_onnx import to_onnx
from dijiang_export.export.to_onnx import export_bundle


@pytest.mark.parametrize("option", ["-o", "--output", None])
def test_the_output_as_an_option(option: str | None, tmp_path: Path) -> None:
    vanilla = neox(layers=1).vanilla().save(tmp_path / "vanilla")
    wrapped = {f"module.{name}": value for name, value in load_file(vanilla / "model.safetensors").items()}
    save_file(wrapped, vanilla / "model.safetensors")
    options = [] if option is None else [option]
    made, bundle = tmp_path / "made", tmp_path / "made.bundle"
    for folder in (made, bundle):
        folder.mkdir()  # an empty folder will do
    run = CliRunner().invoke(convert, [str(vanilla), *options, str(made)], catch_exceptions=False)
    assert run.exit_code == 0
    assert "left out module" in run.stderr  # what was done to the names is said
    assert (made / "model.safetensors").exists()
    run = CliRunner().invoke(to_onnx, [str(made), *options, str(bundle), "--cases", "none", "--json"])
    assert run.exit_code == 0, run.output
    assert json.loads(run.stdout)["bundle"] == str(bundle)
    assert (bundle / "manifest.json").exists()


@pytest.mark.parametrize("command", [convert, to_onnx])
def test_two_outputs(command: object, tmp_path: Path) -> None:
    from dijiang_engines.errors import UsageError

    given = [str(tmp_path / "in"), str(tmp_path / "a"), "-o", str(tmp_path / "b")]
    with pytest.raises(UsageError, match="give one of them"):
        CliRunner().invoke(command, given, catch_exceptions=False)  # type: ignore[arg-type]


def test_convert_without_an_output(tmp_path: Path) -> None:
    from dijiang_engines.errors import UsageError

    with pytest.raises(UsageError, match="no OUTPUT"):
        CliRunner().invoke(convert, [str(tmp_path)], catch_exceptions=False)


def test_a_bundle_under_a_strict_umask(tmp_path: Path) -> None:
    """reference.safetensors is written by a library that chooses its own permissions."""
    folder = neox(layers=1).save(tmp_path / "m")
    old = os.umask(0o077)
    try:
        export_bundle(folder, tmp_path / "b", cases="short")
    finally:
        os.umask(old)
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "b").iterdir()}
    assert "reference.safetensors" in modes
    assert set(modes.values()) == {0o600}


def test_notes_are_kept_in_the_manifest(tmp_path: Path) -> None:
    folder = neox(layers=1).save(tmp_path / "m")
    wrapped = {f"model.{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(wrapped, folder / "model.safetensors")
    report = export_bundle(folder, tmp_path / "b", cases="none")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert "'model.'" in manifest["source"]["notes"][0]
    assert report.notes == manifest["source"]["notes"] + manifest["decay_notes"]
