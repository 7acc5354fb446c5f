"""The heads of compiled files for any kind of processor, and CUDA folders of them: nothing here can run.

They prove orchestration only; tests/arm64 has the real ones.
"""

from __future__ import annotations

import platform
from pathlib import Path

NUMBERS = {"x86_64": 62, "aarch64": 183, "s390x": 22}
OTHER = "x86_64" if platform.machine() == "aarch64" else "aarch64"
"""A kind of processor that this machine is not of."""


def elf(machine: str | int, *, big: bool = False) -> bytes:
    """The head of a 64-bit ELF file, with e_machine as System V's ABI numbers it."""
    number = NUMBERS.get(machine, 0) if isinstance(machine, str) else machine
    order = "big" if big else "little"
    ident = b"\x7fELF" + bytes([2, 2 if big else 1, 1]) + bytes(9)
    return ident + (3).to_bytes(2, order) + number.to_bytes(2, order) + bytes(44)


def archive(*members: tuple[str, bytes]) -> bytes:
    """A static archive as ar(5) describes it."""
    made = b"!<arch>\n"
    for name, content in members:
        made += f"{name:16}{0:<12}{0:<6}{0:<6}{'644':8}{len(content):<10}`\n".encode()
        made += content + b"\n" * (len(content) % 2)
    return made


def static_runtime(machine: str) -> bytes:
    """Like libcudart_static.a: a table of symbols, a table of names, an object."""
    return archive(
        ("/", b"\0\0\0\1sym"), ("//", b"long_name.o/\n"), ("/0", elf(machine)), ("b.o/", elf(machine))
    )


def cuda_target(folder: Path, machine: str = "aarch64", version: int = 12060) -> Path:
    """A folder with CUDA for `machine`, of `version` (1000 * major + 10 * minor)."""
    for name, content in (
        ("lib/libcudart_static.a", static_runtime(machine)),
        ("include/cuda_runtime_api.h", f"#define CUDART_VERSION  {version}\n".encode()),
        ("include/crt/host_config.h", b""),
        ("include/fatbinary_section.h", b""),
        ("include/nv/target", b""),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
