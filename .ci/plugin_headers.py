"""Compile the TensorRT plugin against each of several TensorRT headers: `make plugin-headers`.

Nothing of TensorRT is linked. For each version the library is made, and what it leaves to the process that
loads it is listed. Exits with 1 if one fails, 2 without headers.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

from dijiang_engines.plugin.compiling import first_errors
from dijiang_engines.plugin.toolchain import Headers, read_headers

ROOT = Path(__file__).resolve().parents[1]
HINT = "make plugin-headers TRT_INCLUDE=/path/to/TensorRT-8.6/include:/path/to/TensorRT-11.1/include"


def main() -> int:
    """Build and print a table."""
    parser = argparse.ArgumentParser(
        description="Compile the TensorRT plugin against several versions' headers."
    )
    parser.add_argument("--build", type=Path, default=ROOT / "build/plugin-headers")
    parser.add_argument("--sources", type=Path, default=ROOT / "plugins")
    parser.add_argument("--architecture", default="90", help="one is enough: the shells hold no device code")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("folders", help="folders with NvInfer.h, a colon between them")
    options = parser.parse_args()
    found: dict[str, Headers] = {}
    for folder in filter(None, options.folders.split(":")):
        headers = read_headers(Path(folder))
        if headers is None:
            print(
                f"error: there is no NvInfer.h with its NvInferVersion.h in {folder}\nhint: {HINT}",
                file=sys.stderr,
            )
            return 2
        found[str(headers)] = headers
    if not found:
        print(f"error: no TensorRT headers were named\nhint: {HINT}", file=sys.stderr)
        return 2

    folders = ";".join(str(headers.folder.resolve()) for headers in found.values())
    define = [f"-DTENSORRT_INCLUDE={folders}", f"-DCMAKE_CUDA_ARCHITECTURES={options.architecture}-real"]
    define += ["-DDIJIANG_WARNINGS_AS_ERRORS=ON"]
    configured = run("cmake", "-S", options.sources, "-B", options.build, *define)
    if configured is not None:
        print(f"error: CMake could not configure the build\n{configured}", file=sys.stderr)
        return 1
    rows = [check(headers, options.build, options.jobs, alone=len(found) == 1) for headers in found.values()]
    print(f"{'TensorRT':10}  {'result':8}  {'library':26}  left to the process")
    for version, result, library, rest in rows:
        print(f"{version:10}  {result:8}  {library:26}  {rest}")
    return 0 if all(row[1] == "ok" for row in rows) else 1


def check(headers: Headers, build: Path, jobs: int, alone: bool) -> tuple[str, str, str, str]:
    """Build for one version: (version, "ok" or "failed", file name, undefined symbols or first errors)."""
    name = f"dijiang_tensorrt_{headers.version[0]}"
    target = name if alone else f"dijiang_tensorrt_{headers}"
    errors = run("cmake", "--build", build, "--parallel", str(jobs), "--target", target)
    library = (build if alone else build / f"tensorrt-{headers}") / f"lib{name}.so"
    if errors is None and not library.is_file():
        errors = "the build made no library"
    return str(headers), "ok" if errors is None else "failed", library.name, errors or undefined(library)


def undefined(library: Path) -> str:
    """Symbols that neither the library nor the C and C++ runtimes define."""
    done = subprocess.run(
        ["nm", "--dynamic", "--undefined-only", library], capture_output=True, text=True, check=True
    )
    names = [line.split()[-1] for line in done.stdout.splitlines() if " U " in line]
    return ", ".join(name for name in names if not re.search(r"@(GLIBC|GCC|CXXABI)", name)) or "nothing"


def run(*command: str | Path) -> str | None:
    """None after a success, else the first errors."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return None if done.returncode == 0 else " | ".join(first_errors(done.stdout.splitlines()))


if __name__ == "__main__":
    sys.exit(main())
