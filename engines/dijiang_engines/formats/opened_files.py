"""What was opened is what is read: the files of a folder that somebody may replace or change meanwhile.

A bundle or an engine is opened long before its last file is read: a runner loads the step graph at the
first step, `validate` reads recorded cases for minutes. `to-onnx --force` on the same name puts another
folder there in one step, and a copy over the old files changes them in place. So an opened folder is

- *held* by a descriptor, and its files are named below that (`/proc/self/fd/N/...`, where the system has
  it): a folder that is swapped in under the same name is never looked at. Elsewhere its name is used, and
  compared before and after like a file;
- *compared*: of every file the device, inode, size and times are remembered from the descriptor through
  which it was checked, and looked at again before and after it is used. A file that looks different is
  hashed: if it holds the same bytes it is the same file;
- *kept open*, where a runtime maps a file and goes on reading it: its bytes stay after the folder is gone,
  and a change of them is noticed.

Whoever reads a file gets what was opened, or a `BundleError` that says that it is gone.
"""

from __future__ import annotations

import hashlib
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from dijiang_engines.errors import BundleError, DijiangError
from dijiang_engines.formats.file_table import FileInfo
from dijiang_engines.formats.safe_files import open_regular, sha256_of

_TICK = 20_000_000
"""Nanoseconds; file times move in steps of 1 to 10 ms on Linux (its CONFIG_HZ)."""


class Stamp(NamedTuple):
    """What tells one state of a file from another unread; `changed` also sees renames and links.

    A tuple, since two are made and compared for every step.
    """

    device: int
    inode: int
    size: int
    modified: int
    """Nanoseconds, as all times here."""
    changed: int

    @classmethod
    def of(cls, info: os.stat_result) -> Stamp:
        """From a stat of the file."""
        return cls(info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns)


class OpenedFiles:
    """The files of one folder, as they were when they were checked.

    Args:
        folder: a bundle's or an engine's.
        kind: what it is, for messages.
        again: what to do about a file that is not what the manifest says, for messages.

    Attributes:
        folder: as it was given.
        root: the same folder, to read from: follows no change of `folder`'s name where the system can.
        files: name -> FileInfo, what every file must be; none before `expect`.

    Raises:
        BundleError: the folder cannot be opened.
    """

    def __init__(self, folder: Path, kind: str, again: str) -> None:
        self.folder, self._kind, self._again = folder, kind, again
        self.files: Mapping[str, FileInfo] = {}
        self._stamps: dict[str, Stamp] = {}
        self._kept: dict[str, tuple[int, Stamp]] = {}
        try:
            self._descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise BundleError(f"cannot read {folder}", got=error.strerror) from error
        weakref.finalize(self, os.close, self._descriptor).atexit = False
        self.root = self._below_descriptor() or folder

    def _below_descriptor(self) -> Path | None:
        path = Path(f"/proc/self/fd/{self._descriptor}")
        with suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(self._descriptor)):
                return path
        return None

    def expect(self, files: Mapping[str, FileInfo]) -> None:
        """Say what the files must be, once the manifest has been read."""
        self.files = files

    def note(self, name: str) -> None:
        """Remember a file that has the right size; its hash is checked later, or never.

        Raises:
            BundleError: it is missing, not an ordinary file, or has another size.
        """
        with self._reading(name, self.files[name].bytes) as (_, stamp):
            self._stamps[name] = stamp

    def verify(self, name: str, on_bytes: Callable[[int], None] | None = None) -> None:
        """Check a file's hash.

        Raises:
            BundleError: it is missing or differs.
        """
        with self._reading(name, self.files[name].bytes) as (file, stamp):
            found = sha256_of(file, on_bytes)
        self._accept(name, stamp, found)

    def read(self, name: str, most: int) -> bytes:
        """A whole file of at most `most` bytes, with the right hash.

        Raises:
            BundleError: it is missing, too large, or differs.
        """
        expected = self.files[name].bytes
        with self._reading(name, expected, most) as (file, stamp):
            data = file.read(expected + 1)
        self._accept(name, stamp, hashlib.sha256(data).hexdigest())
        return data

    def check(self, *names: str) -> None:
        """Look whether these files are still what was opened; what looks different is hashed.

        Raises:
            BundleError: one was replaced, changed or removed.
        """
        for name in names:
            if self._look(name) != self._stamps.get(name):
                self.verify(name)

    @contextmanager
    def unchanged_by_name(self, *names: str) -> Iterator[None]:
        """As `unchanged`, for a reader in another process, which has to take the folder by its name.

        Raises:
            BundleError: as `unchanged`; or the name leads to another folder, before the block or after it.
        """
        with self.unchanged(*names):
            self._check_name()
            yield
            self._check_name()

    def _check_name(self) -> None:
        with suppress(OSError):
            if os.path.samestat(os.stat(self.folder), os.fstat(self._descriptor)):
                return
        raise self._replaced()

    @contextmanager
    def unchanged(self, *names: str) -> Iterator[Path]:
        """For a reader that takes a path: the folder to read from, whose `names` do not change meanwhile.

        Yields:
            `root`. Errors of the block name `folder` in its place.

        Raises:
            BundleError: one of the files was replaced, changed or removed, before the block or in it. What
                the block made may then be of either state: drop it.
        """
        with self.named():
            by_name = self.root == self.folder
            place = self._place_at_rest() if by_name else self._place()
            self.check(*names)
            before = [self._stamps[name] for name in names]
            try:
                yield self.root
            except Exception as error:
                # A reader that resolves names itself may stumble over a folder that only changed its name.
                if [self._look(name) for name in names] != before or self._place() != place:
                    raise self._replaced() from error
                raise
            moved = by_name and self._place() != place
            if moved or [self._look(name) for name in names] != before:
                raise self._replaced()

    @contextmanager
    def named(self) -> Iterator[None]:
        """In errors of the block, `root` is called by the folder's name."""
        try:
            yield
        except DijiangError as error:
            root, folder = str(self.root), str(self.folder)
            error.what = error.what.replace(root, folder)
            error.args = (error.what,)
            for part in ("got", "expected", "hint"):
                if (text := vars(error)[part]) is not None:
                    setattr(error, part, text.replace(root, folder))
            raise

    def keep_open(self, name: str) -> None:
        """Hold on to a file that a runtime maps, for `check_kept`; nothing if it is held already.

        Raises:
            BundleError: it is not what was opened.
        """
        if name in self._kept:
            return
        with self._reading(name, self.files[name].bytes) as (file, stamp):
            if stamp != self._stamps.get(name):
                self._accept(name, stamp, sha256_of(file))
            descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, descriptor).atexit = False
        self._kept[name] = (descriptor, stamp)

    def check_kept(self, name: str) -> None:
        """Look whether a kept file still holds its bytes; takes microseconds unless it looks different.

        Raises:
            BundleError: somebody wrote to it.
        """
        if name not in self._kept:
            return
        descriptor, stamp = self._kept[name]
        now = Stamp.of(os.fstat(descriptor))
        if now == stamp:
            return
        with os.fdopen(os.dup(descriptor), "rb") as file:  # removed, renamed, or changed
            file.seek(0)
            if now.size != stamp.size or sha256_of(file) != self.files[name].sha256:
                raise self._replaced(name)
        self._kept[name] = (descriptor, now)

    # -- pieces ----------------------------------------------------------------------------------------

    @contextmanager
    def _reading(self, name: str, size: int, most: int | None = None) -> Iterator[tuple[BinaryIO, Stamp]]:
        """An open file and its stamp, which is the same afterwards."""
        with self.named(), ExitStack() as stack:
            try:
                file = stack.enter_context(open_regular(self.root / name, expected_bytes=size, most=most))
            except BundleError as error:
                if name in self._stamps:  # it was there, and right
                    raise self._replaced(name) from error
                raise
            stamp = Stamp.of(os.fstat(file.fileno()))
            yield file, stamp
            if Stamp.of(os.fstat(file.fileno())) != stamp:
                raise self._replaced(name)

    def _accept(self, name: str, stamp: Stamp, found: str) -> None:
        expected = self.files[name].sha256
        if found == expected:
            self._stamps[name] = stamp
            return
        if self._stamps.get(name, stamp) != stamp:
            raise self._replaced(name)
        raise BundleError(
            f"{self.folder / name} is corrupt: its SHA-256 differs from the manifest's",
            got=found, expected=expected, hint=self._again,
        )  # fmt: skip

    def _look(self, name: str) -> Stamp | None:
        try:
            return Stamp.of(os.stat(self.root / name, follow_symlinks=False))
        except OSError:
            return None

    def _place(self) -> Stamp | None:
        """What stands under the folder's name now."""
        try:
            return Stamp.of(os.stat(self.folder))
        except OSError:
            return None

    def _place_at_rest(self) -> Stamp | None:
        """What stands under the folder's name, whose next change will show.

        Two swaps between two ticks of the file system's clock leave the times as they were. So a folder whose
        times are of the present tick is looked at again after it: from then on every swap shows.

        Raises:
            BundleError: it changed meanwhile.
        """
        place = self._place()
        if place is not None and 0 <= time.time_ns() - place.changed < _TICK:
            time.sleep(_TICK / 1e9)
            if self._place() != place:
                raise self._replaced()
        return place

    def _replaced(self, name: str | None = None) -> BundleError:
        what = f"the {self._kind} {self.folder} was replaced or changed while it was open"
        return BundleError(what, got=name, hint="open it again: nothing of two versions may be mixed")
