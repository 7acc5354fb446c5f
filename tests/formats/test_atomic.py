"""Output folders appear whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dijiang_engines.errors import CheckpointError, OutputError
from dijiang_engines.formats import atomic
from dijiang_engines.formats.atomic import output_folder, remove_stale
from dijiang_engines.formats.temporary_names import machine as this_machine


def fill(target: Path, body: Callable[[Path], object], *, force: bool = False) -> None:
    with output_folder(target, force=force) as temporary:
        write(temporary, "new")
        body(temporary)


def fails(error: BaseException) -> Callable[[Path], object]:
    def body(temporary: Path) -> None:
        raise error

    return body


def write(folder: Path, text: str = "x") -> None:
    (folder / "manifest.json").write_text(text)
    (folder / "sub").mkdir()
    (folder / "sub" / "data").write_text(text)


def test_appears_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "out"
    with output_folder(target) as temporary:
        write(temporary)
        assert not target.exists()
        assert temporary.parent == target.parent
    assert sorted(p.name for p in target.parent.iterdir()) == ["out"]
    assert (target / "sub" / "data").read_text() == "x"


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        with output_folder(tmp_path / "out"):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("exception", [ValueError, KeyboardInterrupt, SystemExit, CheckpointError])
def test_nothing_is_left_after_an_exception(tmp_path: Path, exception: type[BaseException]) -> None:
    with pytest.raises(exception):
        fill(tmp_path / "new" / "out", fails(exception("no")))
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_refused_and_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "manifest.json").write_text("old")
    with pytest.raises(OutputError, match="already exists") as caught, output_folder(target):
        pytest.fail("the block must not run")
    assert "--force" in str(caught.value)
    assert (target / "manifest.json").read_text() == "old"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_force_replaces(tmp_path: Path, can_exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    target = tmp_path / "out"
    with output_folder(target) as temporary:
        write(temporary, "old")
    with output_folder(target, force=True) as temporary:
        (temporary / "manifest.json").write_text("new")
        assert (target / "manifest.json").read_text() == "old"
    assert [p.name for p in target.iterdir()] == ["manifest.json"]
    assert (target / "manifest.json").read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_force_keeps_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with output_folder(target) as temporary:
        write(temporary, "old")
    with pytest.raises(RuntimeError):
        fill(target, fails(RuntimeError()), force=True)
    assert (target / "manifest.json").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_force_spares_foreign_folders_files_and_links(tmp_path: Path) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "thesis.tex").write_text("years")
    with pytest.raises(OutputError, match="holds something else"), output_folder(documents, force=True):
        pass
    assert (documents / "thesis.tex").read_text() == "years"
    (tmp_path / "file").write_text("f")
    (tmp_path / "link").symlink_to(documents)
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="not a folder"), output_folder(tmp_path / name, force=True):
            pass
    assert (tmp_path / "link").is_symlink()


def test_force_spares_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    for path in (".", "..", "/"):
        with pytest.raises(OutputError, match="current folder"), output_folder(path, force=True):
            pass
    assert (tmp_path / "inner").is_dir()


def test_force_takes_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with output_folder(tmp_path / "out", force=True) as temporary:
        write(temporary)
    assert (tmp_path / "out" / "manifest.json").exists()


def test_full_disk_inside_the_block(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no space left") as caught:
        fill(tmp_path / "out", lambda _: Path("/dev/full").write_bytes(b"x"))
    assert isinstance(caught.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_reported_by_a_library_in_words(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="no space left"), output_folder(tmp_path / "out"):
        raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_behind_another_exception(tmp_path: Path) -> None:
    error = RuntimeError("writer failed")
    error.__cause__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OutputError, match="no space left"):
        fill(tmp_path / "out", fails(error))


def test_unrelated_os_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), output_folder(tmp_path / "out"):
        (tmp_path / "absent").read_bytes()
    with pytest.raises(PermissionError), output_folder(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "denied", "/somewhere/else")


def test_a_parent_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="cannot write"), output_folder("/proc/dijiang-out"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"), output_folder(tmp_path / "file" / "out"):
        pass

    def read_only(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(OutputError, match="cannot write") as caught, output_folder(tmp_path / "out"):
        pass
    assert "Read-only" in str(caught.value)


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"

    def somebody_else(_: Path) -> None:
        target.mkdir()
        (target / "theirs").write_text("theirs")

    with pytest.raises(OutputError, match="already exists"):
        fill(target, somebody_else)
    assert [p.name for p in target.iterdir()] == ["theirs"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


CHILD = """
import sys, time
from pathlib import Path
from dijiang_engines.formats.atomic import output_folder
with output_folder(sys.argv[1]) as temporary:
    (temporary / "weights.data").write_bytes(b"x" * 1000)
    print("ready", flush=True)
    time.sleep(60)
"""


def test_kill_9_leaves_no_output_and_the_next_run_cleans_up(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with subprocess.Popen([sys.executable, "-c", CHILD, str(target)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        (temporary,) = tmp_path.iterdir()
        assert remove_stale(tmp_path) == []  # still alive: not ours to remove
        assert temporary.is_dir()
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not target.exists()
    with output_folder(target) as fresh:
        write(fresh)
        assert not temporary.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def dead_name(target: str, role: str, machine: str | None = None) -> str:
    """A temporary name of a process that is gone: this process's id with an impossible start time."""
    return f".{target}.dijiang-{role}-{machine or this_machine()}-{os.getpid()}-1-0"


def test_a_folder_moved_aside_gets_its_name_back(tmp_path: Path) -> None:
    aside = tmp_path / dead_name("out", "old")
    aside.mkdir()
    (aside / "manifest.json").write_text("precious")
    assert remove_stale(tmp_path) == [aside]
    assert (tmp_path / "out" / "manifest.json").read_text() == "precious"
    again = tmp_path / dead_name("out", "old")
    again.mkdir()
    remove_stale(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_stale_names_of_other_machines_and_other_programs_stay(tmp_path: Path) -> None:
    names = [dead_name("out", "tmp", "00000000"), ".out.tmp-1-2", "out", ".out.dijiang-tmp-x-1-1-0"]
    for name in names:
        (tmp_path / name).mkdir()
    (tmp_path / dead_name("file", "old")).write_text("files are never moved aside")
    assert remove_stale(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == len(names) + 1


def test_long_names(tmp_path: Path) -> None:
    target = tmp_path / ("ü" * 127)
    with output_folder(target) as temporary:
        write(temporary)
    assert target.is_dir()


# -- folders that are there, mount points, permissions ------------------------------------------------------


@pytest.mark.parametrize("force", [False, True])
def test_an_empty_folder_is_filled_and_keeps_its_permissions(force: bool, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o700)
    with output_folder(tmp_path / "out", force=force) as temporary:
        write(temporary)
    assert (tmp_path / "out" / "manifest.json").exists()
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o700
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_that_fills_meanwhile_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the last check and the renaming, too: rename(2) takes empty folders only."""
    target = tmp_path / "out"
    target.mkdir()
    put = atomic._put_in_place

    def late(temporary: Path, place: Path, force: bool) -> None:
        (target / "theirs").write_text("theirs")
        put(temporary, place, force)

    monkeypatch.setattr(atomic, "_put_in_place", late)
    with pytest.raises(OutputError, match="already exists"):
        fill(target, lambda _: None)
    assert [p.name for p in target.iterdir()] == ["theirs"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_empty_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="current folder"), output_folder("."):
        pytest.fail("the block must not run")


@pytest.mark.parametrize("umask", [0o077, 0o027, 0o022, 0o002])
@pytest.mark.parametrize("hard_wired", [0o644, 0o600, 0o666, 0o755])
def test_files_get_the_permissions_that_the_umask_leaves(umask: int, hard_wired: int, tmp_path: Path) -> None:
    old = os.umask(umask)
    try:
        with output_folder(tmp_path / "out") as temporary:
            write(temporary)
            for file in (temporary / "manifest.json", temporary / "sub" / "data"):
                file.chmod(hard_wired)
    finally:
        os.umask(old)
    for file in ("manifest.json", "sub/data"):
        expected = (0o777 if hard_wired & 0o111 else 0o666) & ~umask
        assert (tmp_path / "out" / file).stat().st_mode & 0o777 == expected
    assert (tmp_path / "out" / "sub").stat().st_mode & 0o777 == 0o777 & ~umask


MOUNTED = """
import sys
from pathlib import Path
from dijiang_engines.formats.atomic import output_folder
from dijiang_engines.errors import OutputError
for force in (False, True):
    try:
        with output_folder(sys.argv[1], force=force):
            print("the block ran")
    except OutputError as error:
        print(error.what, "|", error.hint)
"""


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
@pytest.mark.parametrize("place", [".", "inner folder"])
def test_mount_points_are_noticed_at_once(kind: str, place: str, tmp_path: Path) -> None:
    """Real mounts, in a namespace of their own: a bind mount on the same disk is one as well."""
    target = tmp_path / "out put"
    mounted = target / place
    mounted.mkdir(parents=True)
    (target / "manifest.json").write_text("{}")
    (tmp_path / "disk").mkdir()
    mount = "mount -t tmpfs none" if kind == "tmpfs" else f"mount --bind '{tmp_path / 'disk'}'"
    script = f"{mount} '{mounted}' && exec '{sys.executable}' -c \"$0\" '{target}'"
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, MOUNTED]
    done = subprocess.run(inside, capture_output=True, text=True, check=False)
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no namespaces here: {done.stderr[:100]}")
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        assert "something is mounted there | choose a name inside it" in line
