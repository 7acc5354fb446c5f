"""Output folders that appear whole or not at all.

`output_folder` hands out a temporary folder beside the target; when the block ends well, the folder is
flushed to disk and renamed into place, and when it does not, nothing is left. A process that is killed
cannot clean up after itself: its temporary folder's name tells the next run who made it, and that run
removes it once that process is gone.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from dijiang_engines.errors import OutputError
from dijiang_engines.formats.temporary_names import maker_of, temporary_name

_RENAME_EXCHANGE = 2  # linux/fs.h
_AT_FDCWD = -100  # linux/fcntl.h


@contextmanager
def output_folder(
    path: str | Path,
    *,
    force: bool = False,
    markers: Sequence[str] = ("manifest.json", "config.json"),
) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends without an exception.

    Args:
        path: where the folder shall appear. Missing parents are made; an empty folder that is there already
            is filled, and keeps its permissions.
        force: replace a folder that is already there, in one step: at every moment the old or the new
            one is complete under its name (where the file system can exchange two names; otherwise there
            is a short moment with neither, which the next run repairs).
        markers: `force` replaces only a folder that is empty or holds one of these files, so that a
            mistyped path cannot cost somebody their documents.

    Yields:
        The temporary folder, beside `path` and so on the same file system, with ordinary permissions. Files
        get them too at the end, whatever their writers chose: what the process's umask leaves.

    Raises:
        OutputError: `path` exists and is not an empty folder; something is mounted there; it cannot be
            written to; the disk is full, also when that happens inside the block. Other exceptions of the
            block pass unchanged. In every case, also for KeyboardInterrupt, nothing is left behind.
    """
    target = Path(os.path.abspath(path))
    _check_target(target, force, markers)
    try:
        made_parents = _make_parents(target.parent)
    except OSError as error:
        raise cannot_write(target, error) from error
    temporary = target.parent / temporary_name(target, "tmp")
    try:
        try:
            remove_stale(target.parent)
            temporary.mkdir()
        except OSError as error:
            raise cannot_write(target, error) from error
        try:
            yield temporary
            _settle_tree(temporary)
        except Exception as error:
            translated = write_error(target, temporary, error)
            if translated is None:
                raise
            raise translated from error
        _check_target(target, force, markers)
        try:
            _put_in_place(temporary, target, force)
            flush(target.parent)
        except OSError as error:
            raise cannot_write(target, error) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for parent in reversed(made_parents):
            with suppress(OSError):
                parent.rmdir()
        raise


def remove_stale(folder: Path) -> list[Path]:
    """Remove what killed processes of this machine left in `folder`; returns what was there.

    These are folders, and the files of `atomic_file`. A folder that such a process had moved aside, and
    whose replacement never arrived, gets its name back.
    """
    found = []
    for entry in sorted(folder.iterdir()):
        maker = maker_of(entry.name)
        if maker is None or entry.is_symlink() or maker.may_be_alive():
            continue
        target = folder / maker.target
        if not entry.is_dir():
            if maker.role != "tmp" or not entry.is_file():
                continue
            with suppress(OSError):  # somebody else's, in a folder that is shared
                entry.unlink()
        elif maker.role == "old" and not os.path.lexists(target):
            os.rename(entry, target)
        else:
            shutil.rmtree(entry, ignore_errors=True)
        found.append(entry)
    return found


def _check_target(target: Path, force: bool, markers: Sequence[str]) -> None:
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_dir():
        if not force:
            raise _exists(target)
        raise OutputError(
            f"the output {target} exists and is not a folder",
            hint="--force replaces only folders: remove it yourself, or choose another name",
        )
    try:
        names = {entry.name for entry in target.iterdir()}
    except OSError as error:
        raise cannot_write(target, error) from error
    mounts = _mounts_in(target)
    if names and not force and not mounts:
        raise _exists(target)
    _check_place(target, mounts)
    if names and not names & set(markers):
        raise OutputError(
            f"the output {target} holds something else, so that --force does not replace it",
            got=", ".join(sorted(names)[:5]),
            expected=f"an empty folder, or one with {' or '.join(markers)}",
            hint="choose another name",
        )


def _exists(target: Path) -> OutputError:
    return OutputError(
        f"the output {target} already exists", hint="choose another name, or replace it with --force"
    )


def _check_place(target: Path, mounts: list[Path]) -> None:
    """A folder that is there must be one that can be replaced."""
    here = Path.cwd()
    if target == here or target in here.parents:
        raise OutputError(
            f"the output {target} is the current folder or above it", hint="choose another name"
        )
    if mounts:
        raise OutputError(
            f"the output {target} cannot be replaced, as something is mounted there",
            got=f"a mount point at {mounts[0]}",
            hint=f"choose a name inside it, such as {target / 'out'}",
        )


def _mounts_in(target: Path) -> list[Path]:
    """Mount points at `target` and below, bind mounts included, which os.path.ismount does not see."""
    found = [target] if os.path.ismount(target) else []
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return found  # not Linux
    for line in lines:
        # proc_pid_mountinfo(5): the fifth field, with blanks and the like as \\ooo
        name = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split(b" ")[4])
        place = Path(os.fsdecode(name))
        if place.is_relative_to(os.path.realpath(target)):
            found.append(place)
    return found


def _make_parents(folder: Path) -> list[Path]:
    """Make `folder` and what is missing above it; returns what was made, outermost first."""
    missing = []
    while not os.path.lexists(folder):
        missing.append(folder)
        folder = folder.parent
    made: list[Path] = []
    for parent in reversed(missing):
        try:
            parent.mkdir(exist_ok=True)
        except OSError:
            for done in reversed(made):
                done.rmdir()
            raise
        made.append(parent)
    return made


def _put_in_place(temporary: Path, target: Path, force: bool) -> None:
    mode = stat.S_IMODE(os.stat(target).st_mode) if os.path.isdir(target) else None
    try:
        os.rename(temporary, target)  # also over an empty folder, in one step: rename(2)
        if mode is not None:
            os.chmod(target, mode)
        return
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        if not force:
            raise _exists(target) from None
    if _exchange(temporary, target):
        shutil.rmtree(temporary, ignore_errors=True)
        return
    old = target.parent / temporary_name(target, "old")
    os.rename(target, old)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names at once, renameat2(2); False where the system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    done = renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE)
    return bool(done == 0)


def _settle_tree(folder: Path) -> None:
    """Give files the permissions that the umask leaves, and flush everything to disk.

    The folder itself was made with them and so tells the umask, which cannot be asked for without setting it.
    """
    allowed = stat.S_IMODE(os.stat(folder).st_mode) & 0o777
    for root, _, files in os.walk(folder):
        for name in files:
            _settle(Path(root, name), allowed)
        flush(Path(root))


def _settle(path: Path, allowed: int) -> None:
    mode = stat.S_IMODE(os.lstat(path).st_mode)
    wanted = allowed & (0o777 if mode & 0o111 else 0o666)
    if mode != wanted and not path.is_symlink():
        with suppress(OSError):  # file systems without permissions of their own
            os.chmod(path, wanted)
    flush(path)


def flush(path: Path) -> None:
    """Have a file's or a folder's content on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some file systems cannot flush folders, and say so this way
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_error(target: Path, temporary: Path, error: Exception) -> OutputError | None:
    """An OutputError for an exception that says that the output could not be written, or None."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OutputError):
            return None
        if isinstance(cause, OSError):
            if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                return cannot_write(target, cause)
            where = [os.fsdecode(n) for n in (cause.filename, cause.filename2) if isinstance(n, (str, bytes))]
            ours = any(Path(name).is_relative_to(temporary) for name in where)
            if ours and cause.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO):
                return cannot_write(target, cause)
        # libraries in other languages put the system's error into words
        elif "No space left on device" in str(cause) or "(os error 28)" in str(cause):
            return cannot_write(target, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def cannot_write(target: Path, error: OSError) -> OutputError:
    """What to say when the system refuses to write the output `target`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = ""
        with suppress(OSError):
            free = f", {shutil.disk_usage(target.parent).free / 2**20:.0f} MiB free"
        return OutputError(
            f"no space left to write {target}",
            got=f"{error.strerror}{free}",
            hint="make room or choose an output on another disk; nothing was left behind",
        )
    return OutputError(
        f"cannot write the output {target}",
        got=error.strerror or str(error),
        hint="choose an output in a folder that you may write to",
    )
