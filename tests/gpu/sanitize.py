"""compute-sanitizer over calls of every kernel: memcheck, initcheck, synccheck and racecheck.

    python tests/gpu/sanitize.py libdijiang_kernels.so [--kernels linear] [--tools memcheck] [--built FOLDER]

Compiles the programs sanitizer_<kernels>.cpp with nvcc, unless a folder has them compiled, runs each bare and
under each tool, and exits with 1 if a tool reports anything or a program finds a fault. Needs a GPU and
CUDA's toolkit; nothing of this project but the library.

racecheck is first shown sanitizer_control.cu, which has no race. Where it finds one there, it does not follow
bar.arrive, and the kernels that use it (KERNELS_THAT_ARRIVE) are left out of what it checks.
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
KERNELS = ("linear", "quantised", "attention", "decode", "step", "sampling")
ARGUMENTS = {"quantised": ("linear", "both"), "decode": ("attention", "decode")}
"""Kernels that another program calls: which, and what it is told."""
KERNELS_THAT_ARRIVE = ("fused_kernel", "wide_features_kernel")
SUMMARY = re.compile(r"(?:ERROR|RACECHECK|LEAK) SUMMARY: .*|\d+ calls, \d+ bad")


class Run:
    """One command's outcome."""

    def __init__(self, command: list[str], environment: dict[str, str], timeout: float) -> None:
        start = time.monotonic()
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout, check=False
            )
            self.output, self.code = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as error:
            self.output, self.code = (error.stdout or b"").decode(errors="replace"), 124
        self.seconds = time.monotonic() - start
        self.summary = "; ".join(SUMMARY.findall(self.output))

    def print(self, name: str) -> None:
        print(f"{name:21} exit {self.code}, {self.seconds:.1f} s: {self.summary}", flush=True)


def compile_with_nvcc(source: Path, target: Path, *more: str) -> Path:
    include = f"-I{HERE.parents[1] / 'plugins/include'}"
    subprocess.run(
        ["nvcc", "-std=c++17", "-O1", "-arch=native", include, str(source), *more, "-o", str(target)],
        check=True,
    )
    return target


class Programs:
    """The programs by name, compiled where `built` does not have them."""

    def __init__(self, library: Path, built: Path | None, scratch: Path) -> None:
        self._library, self._built, self._scratch = library, built, scratch

    def path(self, name: str) -> Path:
        if self._built is not None:
            return self._built.resolve() / name
        target = self._scratch / name
        if target.exists():
            return target
        if name == "control":
            return compile_with_nvcc(HERE / "sanitizer_control.cu", target)
        return compile_with_nvcc(HERE / f"sanitizer_{name}.cpp", target, str(self._library))


def check(kernels: str, tool: str, programs: Programs, environment: dict[str, str], timeout: float) -> bool:
    """Run the kernels' program under a tool, or bare with ""; prints what came of it."""
    options = TOOLS.get(tool, [])
    program, *case_list = ARGUMENTS.get(kernels, (kernels,))
    if tool == "racecheck":
        case_list.append("quick")
        if kernels == "attention":
            options = options + not_understood(programs.path("control"), options, environment, timeout)
    command = [str(programs.path(program)), *case_list]
    if tool:
        command = ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", *options, *command]
    run = Run(command, environment, timeout)
    run.print(f"{kernels}, {tool or 'no tool'}")
    clean = " 0 error" in run.summary or " 0 hazard" in run.summary
    if run.code == 0 and " 0 bad" in run.summary and (clean or not tool):
        if not tool:
            print(run.output.rstrip())
        return True
    lines = run.output.splitlines()
    print("\n".join(lines[:60] + ["..."] * (len(lines) > 90) + lines[60:][-30:]), flush=True)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--kernels", default=",".join(KERNELS), help="default: %(default)s")
    parser.add_argument("--tools", default=",".join(TOOLS), help="default: %(default)s")
    parser.add_argument(
        "--built",
        type=Path,
        help="a folder with the programs compiled: linear, attention, step, sampling, control",
    )
    parser.add_argument("--timeout", type=float, default=600, help="seconds per tool (default: %(default)s)")
    arguments = parser.parse_args()
    library = arguments.library.resolve()
    environment = os.environ | {
        "LD_LIBRARY_PATH": f"{library.parent}:{os.environ.get('LD_LIBRARY_PATH', '')}"
    }
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        programs = Programs(library, arguments.built, Path(scratch))
        for kernels in arguments.kernels.split(","):
            for tool in ["", *arguments.tools.split(",")]:
                if not check(kernels, tool, programs, environment, arguments.timeout):
                    failed.append(f"{kernels}, {tool or 'no tool'}")
    print("failed: " + "; ".join(failed) if failed else "no tool found anything")
    return 1 if failed else 0


def not_understood(
    control: Path, options: list[str], environment: dict[str, str], timeout: float
) -> list[str]:
    """Options that leave out the kernels that this racecheck cannot judge."""
    command = ["compute-sanitizer", "--tool=racecheck", "--error-exitcode=9", *options]
    run = Run([*command, str(control.resolve())], environment, timeout)
    run.print("control")
    if run.code == 0:
        return []
    names = ", ".join(KERNELS_THAT_ARRIVE)
    print(f"racecheck reports races in a program that has none (bar.arrive): it does not check {names}")
    return [f"--kernel-name-exclude=kns={name}" for name in KERNELS_THAT_ARRIVE]


if __name__ == "__main__":
    sys.exit(main())
