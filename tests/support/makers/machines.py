"""A machine and a GPU as `doctor` sees them, made up."""

from __future__ import annotations

from dijiang_engines import machine

HERE = machine.Machine(
    system="Test OS", architecture="x86_64", python="3.11.0", cpu="Test CPU", logical_cpus=4, usable_cpus=2,
    cpu_features=("avx2",), memory_bytes=8 << 30, available_bytes=4 << 30, gpus=(), board=None,
)  # fmt: skip
GPU = machine.Gpu("NVIDIA Test", 16 << 30, "555.1", "8.9")


def works(name: str) -> tuple[bool, str]:
    return True, f"tried {name}"
