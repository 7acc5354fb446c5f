"""Fetch TensorRT's lean runtimes, which hold its plugin registry, for `make registry-test`.

The wheels (43 MB each) are on the package index, come with NVIDIA's licence, are unpacked under build/ and go
nowhere else. They need no GPU.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VERSIONS = {10: "10.15.1.29", 11: "11.4.0.106"}
"""By major version. Before 10.15.1 the index had only packages that fetch from elsewhere."""


def fetch(major: int, folder: Path) -> Path:
    """libnvinfer_lean.so.<major> in a folder of its version; downloaded only if it is not there yet."""
    version = VERSIONS[major]
    library = folder / version / f"libnvinfer_lean.so.{major}"
    if library.is_file():
        return library
    with tempfile.TemporaryDirectory() as temporary:
        package = f"tensorrt_lean_cu13_libs=={version}"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        subprocess.run([*command, "--dest", temporary, package], check=True)
        wheel = next(Path(temporary).glob("*.whl"))
        library.parent.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(".part")
        with zipfile.ZipFile(wheel) as archive:
            part.write_bytes(archive.read(f"tensorrt_lean_libs/{library.name}"))
        part.rename(library)
    return library


def main() -> int:
    """Fetch every version."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    for major in VERSIONS:
        print(fetch(major, options.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
