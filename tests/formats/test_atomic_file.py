"""Output files appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dijiang_engines.errors import OutputError, SessionError
from dijiang_engines.formats.atomic_file import check_output_file, output_file

WRITER = """
import sys, time
from dijiang_engines.formats.atomic_file import output_file
with output_file(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("ready", flush=True)
    time.sleep(60)
"""


def write(path: Path, data: bytes = b"new", *, force: bool = True) -> None:
    with output_file(path, force=force) as file:
        file.write(data)


def test_appears_only_at_the_end_and_replaces_in_one_step(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with output_file(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_bytes() == b"old"
        assert len(list(tmp_path.iterdir())) == 2
    assert target.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask_or_the_older_file(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        write(tmp_path / "out")
        (tmp_path / "secret").touch(0o600)
        write(tmp_path / "secret")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o666 & ~umask
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit, SessionError])
def test_nothing_is_left_after_an_exception(tmp_path: Path, exception: type[BaseException]) -> None:
    (tmp_path / "out").write_bytes(b"old")

    def interrupted() -> None:
        with output_file(tmp_path / "out") as file:
            file.write(b"half")
            raise exception("no")

    with pytest.raises(exception):
        interrupted()
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_bytes() == b"old"


def test_a_full_disk_is_explained(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no space left"), output_file(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_really(tmp_path: Path) -> None:
    """The limit on file sizes stands in for a full disk."""
    code = (
        "import resource, signal, sys\nfrom dijiang_engines.formats.atomic_file import output_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "with output_file(sys.argv[1]) as file:\n    file.write(bytes(5000))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], capture_output=True, text=True)
    assert "OutputError: cannot write the output" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_is_cleaned_up_after_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", WRITER, target], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        (left,) = tmp_path.iterdir()
        write(tmp_path / "another")
        assert left.exists()  # its maker is alive
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert left.read_bytes() == b"half"
    write(tmp_path / "another")
    assert os.listdir(tmp_path) == ["another"]


def test_links_stay_and_their_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("folder/real")
    (tmp_path / "dangling").symlink_to("folder/fresh")
    write(tmp_path / "link")
    write(tmp_path / "dangling")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "folder" / "real").read_bytes() == b"new"
    assert (tmp_path / "folder" / "fresh").read_bytes() == b"new"


def test_what_must_not_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "out").write_bytes(b"old")
    for name in ("folder", "pipe"):
        with pytest.raises(OutputError, match="not an ordinary file"):
            write(tmp_path / name)
    with pytest.raises(OutputError, match="not an ordinary file"):
        write(Path("/dev/null"))
    with pytest.raises(OutputError, match="already exists"):
        write(tmp_path / "out", force=False)
    with pytest.raises(OutputError, match="no folder"):
        write(tmp_path / "none" / "out")
    with pytest.raises(OutputError, match="cannot write"):
        write(tmp_path / "out" / "below-a-file")
    with pytest.raises(OutputError, match="cannot write"):
        check_output_file("a\0b")
    assert sorted(os.listdir(tmp_path)) == ["folder", "out", "pipe"]


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="already exists"), output_file(tmp_path / "out", force=False):
        (tmp_path / "out").write_bytes(b"somebody else's")
    assert (tmp_path / "out").read_bytes() == b"somebody else's"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_places(tmp_path: Path) -> None:
    (tmp_path / "out").touch(0o444)
    with pytest.raises(OutputError, match="out is read-only"):
        write(tmp_path / "out")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(OutputError, match=r"folder .* is read-only"):
            write(tmp_path / "new")
    finally:
        tmp_path.chmod(0o755)


def test_long_names(tmp_path: Path) -> None:
    write(tmp_path / ("ü" * 127))
    assert os.listdir(tmp_path) == ["ü" * 127]
