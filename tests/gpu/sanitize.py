"""compute-sanitizer over calls of every kernel: memcheck, initcheck, synccheck and racecheck.

    python tests/gpu/sanitize.py libdijiang_kernels.so [--driver DRIVER] [--tools memcheck,racecheck]

Compiles sanitizer_driver.cpp with nvcc, unless a compiled driver is given, runs it bare and under each tool,
and exits with 1 if a tool reports anything or a number is not finite. Needs a GPU and CUDA's toolkit; nothing
of this project but the library.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOOLS = {
    "memcheck": ["--leak-check=full"],
    "initcheck": [],
    "synccheck": [],
    "racecheck": ["--racecheck-report=all"],
}


def compile_driver(library: Path, target: Path) -> None:
    """Link the driver with the library, which it then finds through LD_LIBRARY_PATH."""
    sources = [str(HERE / "sanitizer_driver.cpp"), str(library)]
    include = f"-I{HERE.parents[1] / 'plugins/include'}"
    subprocess.run(["nvcc", "-std=c++17", "-O1", include, *sources, "-o", str(target)], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--driver", type=Path, help="a compiled sanitizer_driver.cpp")
    parser.add_argument("--tools", default=",".join(TOOLS), help="default: %(default)s")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per tool (default: %(default)s)")
    arguments = parser.parse_args()
    library = arguments.library.resolve()
    environment = os.environ | {
        "LD_LIBRARY_PATH": f"{library.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    }
    with tempfile.TemporaryDirectory() as scratch:
        driver = arguments.driver and arguments.driver.resolve()
        if driver is None:
            driver = Path(scratch) / "driver"
            compile_driver(library, driver)
        failed = []
        for tool in ["", *arguments.tools.split(",")]:
            command = [str(driver), *(["quick"] if tool == "racecheck" else [])]
            if tool:
                command = [
                    "compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", *TOOLS[tool], *command
                ]  # fmt: skip
            start = time.monotonic()
            try:
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=arguments.timeout,
                    check=False,
                )  # fmt: skip
                output, code = done.stdout + done.stderr, done.returncode
            except subprocess.TimeoutExpired as error:
                output, code = (error.stdout or b"").decode(errors="replace"), 124
            summary = re.findall(r"(?:ERROR|RACECHECK|LEAK) SUMMARY: .*|\d+ calls, \d+ bad", output)
            said = "; ".join(summary)
            good = code == 0 and (tool == "" or " 0 error" in said or " 0 hazard" in said)
            name = tool or "no tool"
            print(f"{name:10} exit {code}, {time.monotonic() - start:.1f} s: {said}", flush=True)
            if not good:
                failed.append(name)
                lines = output.splitlines()
                print("\n".join(lines[:60] + ["..."] * (len(lines) > 90) + lines[60:][-30:]))
            elif tool == "":
                print(output.rstrip())
        print("failed: " + ", ".join(failed) if failed else "no tool found anything")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
