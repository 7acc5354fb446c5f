"""Download the wheels that a list names, without what they need and without installing them: `make bindings`.

pip resolves the list's lines one at a time, so it may name several versions of one package. A wheel that is
there already is kept. Standard library and pip only.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def requirements(text: str) -> list[str]:
    """The lines that say something."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def is_there(requirement: str, folder: Path) -> bool:
    """Is the wheel of "name==version; marker" in the folder?"""
    name, _, version = requirement.partition(";")[0].strip().partition("==")
    return any(folder.glob(f"{name.replace('-', '_')}-{version}-*.whl"))


def fetch(requirement: str, folder: Path) -> bool:
    """Download one; whether that worked. A line whose marker is not for this Python gives nothing."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), requirement]
    return subprocess.run(command, check=False).returncode == 0


def main() -> int:
    """Fetch what is not there yet; 1 if something could not be had."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--list", type=Path, default=HERE / "tensorrt-wheels.txt")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    wanted = requirements(options.list.read_text(encoding="utf-8"))
    missing = [line for line in wanted if not is_there(line, options.folder)]
    failed = [line for line in missing if not fetch(line, options.folder)]
    print(f"{options.folder}: {len(list(options.folder.glob('*.whl')))} wheels, {len(missing)} asked for")
    for line in failed:
        print(f"error: could not fetch {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
