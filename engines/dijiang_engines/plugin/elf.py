"""Which kind of processor compiled code is for: what an ELF file says, or the first one in an archive."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import BinaryIO

from dijiang_engines.errors import DijiangError, PluginError
from dijiang_engines.formats.safe_files import LIMITS, open_regular

# e_machine of the ELF header, at byte 18 (System V ABI, "ELF Header"; numbers as in Linux's elf-em.h)
# -> the name that `uname -m` has for it.
_MACHINES = {3: "i686", 21: "ppc64", 22: "s390x", 40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_HEAD = 20
"""Bytes up to and with e_machine."""
_ARCHIVE = b"!<arch>\n"
_MEMBER = 60
"""Bytes of the head of an archive's member (ar(5)); its size in decimal is in 48 to 58."""
_MOST_MEMBERS = 8
"""So many of an archive are looked at: before the first file there may be tables of symbols and of names."""


def machine_of(path: Path) -> str | None:
    """The kind of processor, such as "aarch64", that a library, a program or a static archive is for.

    None for a file that is none of these, or that cannot be read.
    """
    try:
        with open_regular(path, most=LIMITS["library"], links=True, error=PluginError) as file:
            head = file.read(_HEAD)
            return _in_archive(file) if head.startswith(_ARCHIVE) else _in_head(head)
    except (OSError, PluginError):
        return None


def check_machine(path: Path, error: type[DijiangError], hint: str) -> None:
    """Refuse a library for another kind of processor, of which the loader says at best that it is not there.

    Args:
        path: what is about to be loaded. What is no library passes: the loader says so.
        error: what to raise.
        hint: of the error.

    Raises:
        DijiangError: of type `error`.
    """
    found = machine_of(path)
    if found not in (None, platform.machine()):
        raise error(
            f"{path} is compiled for another kind of processor, and cannot be loaded on this one",
            got=found,
            expected=platform.machine(),
            hint=hint,
        )


def _in_head(head: bytes) -> str | None:
    if len(head) < _HEAD or not head.startswith(b"\x7fELF"):
        return None
    number = int.from_bytes(head[18:20], "big" if head[5] == 2 else "little")
    return _MACHINES.get(number, f"ELF machine {number}")


def _in_archive(file: BinaryIO) -> str | None:
    position = len(_ARCHIVE)
    for _ in range(_MOST_MEMBERS):
        file.seek(position)
        member = file.read(_MEMBER)
        size = member[48:58].strip()
        if len(member) < _MEMBER or not size.isdigit():
            return None
        if machine := _in_head(file.read(_HEAD)):
            return machine
        position += _MEMBER + int(size) + int(size) % 2
    return None
