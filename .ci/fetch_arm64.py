"""What `make test-arm64` works with: CUDA and TensorRT for arm64, a system for arm64 with the package in it.

In FOLDER:
  cuda/       CUDA's headers and static runtime for aarch64, from the package index, of this nvcc's version
  root/       a small Debian for arm64, from the same repositories as this one: packages are unpacked, not
              configured, so no rights are needed and nothing of it runs here. In it, /opt/dijiang: the wheel
              and what it needs, put there by this machine's pip; /wheels: the same as wheels, for a pip there
  lean/       TensorRT's lean runtimes, a folder per version
What cannot be had is said in a sentence; the tests then skip. Standard library and pip only,
but for the package's own search for nvcc.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from dijiang_engines.plugin.toolchain import find_nvccs

ROOT = Path(__file__).resolve().parents[1]
DEBIAN = ("python3-venv", "libstdc++6", "dash", "coreutils")
TESTING = ("pytest", "hypothesis", "onnx")
"""For the host tests of the kernels, which tests/conftest.py's imports come with."""
GLIBCS = ("2_17", "2_26", "2_27", "2_28", "2_31", "2_34", "2_35")
"""Of wheels that may be used: Ubuntu 22.04's is the oldest glibc that a supported JetPack has."""
LEAN = {"whole": ("10.15.1.29", "11.4.0.106"), "short": ("11.4.0.106",)}


class Unavailable(Exception):
    """What cannot be had, in a sentence."""


def main() -> int:
    """Fetch all parts; 0 even if some cannot be had, since the tests know what to do about it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--wheel", type=Path, required=True, help="of the package")
    parser.add_argument("--form", choices=("short", "whole"), default="whole")
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for name, fetch in (
        ("CUDA", lambda: fetch_cuda(folder / "cuda")),
        ("the system", lambda: make_root(folder, options.wheel.resolve(), options.form)),
        ("TensorRT", lambda: [fetch_lean(folder / "lean", version) for version in LEAN[options.form]]),
    ):
        try:
            fetch()
        except (Unavailable, OSError) as error:
            print(f"{name} for arm64 cannot be had: {error}", file=sys.stderr)
    return 0


def fetch_cuda(folder: Path) -> None:
    """CUDA's wheels for aarch64, as `build-plugin --target` says to get them."""
    nvccs = find_nvccs()
    if not nvccs:
        raise Unavailable("there is no nvcc here, whose version it must have")
    done = folder / f".{nvccs[0].release}"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        parts = ("runtime", "nvcc", "crt", "cccl")
        pip(folder, *(f"nvidia-cuda-{part}=={nvccs[0].release}.*" for part in parts), "--no-deps")
        done.touch()


def make_root(folder: Path, wheel: Path, form: str) -> None:
    """The system, new each time; what is downloaded for it stays in apt's and pip's caches."""
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    packages = fetch_debian(folder / "apt")
    part = folder / "root.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    for package in packages:
        run("dpkg-deb", "--extract", package, part)
    versions = sorted(path.name.removeprefix("python") for path in part.glob("usr/bin/python3.*[0-9]"))
    if not versions:
        raise Unavailable("Debian's python3 has no python3.x")
    wanted = [f"{wheel}[cpu]", *TESTING]
    pip(part / "opt/dijiang", *wanted, python=versions[0])
    if form == "whole":
        pip(part / "wheels", *wanted, python=versions[0], command="download")
    for name in ("proc", "dev", "tmp", "checkout"):  # where tests/arm64/enter.sh mounts
        (part / name).mkdir(exist_ok=True)
    part.rename(root)


def fetch_debian(folder: Path) -> list[Path]:
    """The packages for arm64 and what they depend on, through an apt with lists and a cache of its own."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise Unavailable("there is no apt-get or no dpkg-deb here")
    for name in ("state/lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "status").touch()  # nothing is installed
    settings = {
        "APT::Architecture": "arm64", "APT::Architectures::": "arm64", "APT::Install-Recommends": "false",
        "APT::Sandbox::User": "", "Debug::NoLocking": "true", "Acquire::Languages": "none",
        "Dir::State": folder / "state", "Dir::State::status": folder / "status",
        "Dir::Cache": folder / "cache",
    }  # fmt: skip
    apt = ["apt-get", "--quiet", *(f"-o{name}={value}" for name, value in settings.items())]
    run(*apt, "update")
    if shutil.which("qemu-aarch64-static") is None:
        print("hint: to run what is made, apt-get install qemu-user-static", file=sys.stderr)
    run(*apt, "--yes", "--download-only", "install", *DEBIAN)
    return sorted((folder / "cache/archives").glob("*.deb"))


def fetch_lean(folder: Path, version: str) -> None:
    """A lean runtime for aarch64, and its bindings for the Python of the system."""
    place = folder / version
    if place.is_dir():
        return
    part = folder / f"{version}.part"
    shutil.rmtree(part, ignore_errors=True)
    names = [f"tensorrt_lean_cu13_{kind}=={version}" for kind in ("libs", "bindings")]
    found = list((folder.parent / "root/usr/bin").glob("python3.*[0-9]"))
    python = found[0].name.removeprefix("python") if found else None
    pip(part / "wheels", *names, "--no-deps", python=python, command="download")
    for wheel in (part / "wheels").glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(part)
    shutil.rmtree(part / "wheels")
    part.rename(place)


def pip(folder: Path, *arguments: str, python: str | None = None, command: str = "install") -> None:
    """Install or download wheels for arm64 into a folder, in the versions of constraints.txt."""
    to = ["--target", folder] if command == "install" else ["--dest", folder]
    base: list[str | Path] = [sys.executable, "-m", "pip", command, "--quiet", "--disable-pip-version-check"]
    if command == "install":
        base.append("--no-compile")
    base += [
        *to,
        "--only-binary=:all:",
        "--constraint",
        ROOT / "constraints.txt",
        "--platform=manylinux2014_aarch64",
    ]
    base += [f"--platform=manylinux_{glibc}_aarch64" for glibc in reversed(GLIBCS)]
    if python is not None:
        tag = f"cp{python.replace('.', '')}"
        base += [
            f"--python-version={python}",
            "--implementation=cp",
            f"--abi={tag}",
            "--abi=abi3",
            "--abi=none",
        ]
    run(*base, *arguments)


def run(*command: str | Path | Sequence[str]) -> None:
    """Run a command that must succeed, quietly."""
    arguments = [str(part) for part in command]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
    done = subprocess.run(
        arguments, env=environment, text=True, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.startswith(("E:", "ERROR"))]
        raise Unavailable(
            f"{' '.join(arguments[:4])}... failed: {' '.join(lines)[:400] or done.stdout[-400:]}"
        )


if __name__ == "__main__":
    sys.exit(main())
