"""`--save` and `--plot`: whole files or none, known before minutes of measuring."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from dijiang_engines.errors import OutputError
from dijiang_export.cli import main
from dijiang_export.commands.common import save_json


def refuse(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    save_json({"a": 1}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OutputError):
        save_json({"a": 2}, path)
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_save_that_is_killed_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    save_json({"a": 1}, path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        save_json({"a": 2}, path)
    monkeypatch.undo()
    assert json.loads(path.read_text()) == {"a": 1}


@pytest.mark.parametrize(
    "words",
    [
        ["bench", "run", "X"],
        ["bench", "export"],
        ["bench", "peers"],
        ["bench", "kernels"],
        ["bench", "report", "X"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("target", ["no/such.json", "folder", "pipe"])
def test_what_cannot_be_written_is_known_at_once(
    words: list[str], target: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    assert main([*words, "--save", str(tmp_path / target), "--json"]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert json.loads(err)["error"]["type"] == "OutputError"
