"""Run the GPU tests of the kernels and the sanitizers, and write the record that docs/evidence/ keeps.

    python tests/gpu/record.py libdijiang_kernels.so --out kernel-tests.txt [--commit HASH]
        [--built FOLDER] [--pytest="-n 8"]

The record has the machine, the versions, the commands, what passed, the largest errors in units of their
bounds (tests/support/oracles/kernel_bounds.py), the drift and the whole models' errors. Exits with 1 if
anything failed.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TESTS = (
    "tests/kernels/test_attention_is_right.py",
    "tests/kernels/test_linear_gpu.py",
    "tests/kernels/test_kernels_gpu.py",
    "tests/kernels/test_kernels_gpu_use.py",
    "tests/kernels/test_sampling_gpu.py",
)


def output_of(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    except OSError as error:
        return f"({error})"
    return (done.stdout or done.stderr).strip()


def machine(library: Path, commit: str | None) -> list[str]:
    import torch

    kernels = ctypes.CDLL(str(library))
    kernels.dijiang_version.restype = kernels.dijiang_architectures.restype = ctypes.c_char_p
    gpu = output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    sanitizer = output_of("compute-sanitizer", "--version").splitlines()
    return [
        f"GPU: {gpu}",
        f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}",
        f"compute-sanitizer: {next((line for line in sanitizer if 'Version' in line), 'none')}",
        f"kernels {kernels.dijiang_version().decode()} for {kernels.dijiang_architectures().decode()}, "
        f"commit {commit or output_of('git', 'rev-parse', 'HEAD')}, "
        f"SHA-256 {hashlib.sha256(library.read_bytes()).hexdigest()}",
    ]


def largest_errors(text: str) -> list[str]:
    """The table of largest errors by kernel family and type, from the lines that tests print."""
    found: dict[str, list[float]] = {}
    pattern = r"^bounds: (\S+ \S+) (\S+) output (\S+) state (\S+)$"
    for family, dtype, output, state in re.findall(pattern, text, re.MULTILINE):
        row = found.setdefault(f"{family:18} {dtype:9}", [0, 0.0, 0.0])
        row[0] += 1
        row[1:] = [max(a, float(b)) for a, b in zip(row[1:], (output, state), strict=True)]
    lines = [f"{k} {row[0]:5} calls, output {row[1]:.2f}, state {row[2]:.2f}" for k, row in found.items()]
    linear: dict[str, list[float]] = {}
    for dtype, norm, error in re.findall(r"^linear torch\.(\S+) \d+ (\S+) (\S+)$", text, re.MULTILINE):
        linear.setdefault(f"{'linear ' + norm:18} {dtype:9}", []).append(float(error))
    lines += [f"{k} {len(row):5} calls, output {max(row):.2f}" for k, row in linear.items()]
    return ["Largest errors in units of their bounds:", *sorted(lines)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit")
    parser.add_argument("--built", help="as of sanitize.py")
    parser.add_argument("--pytest", default="", help="more arguments for pytest")
    parser.add_argument("--timeout", type=float, default=600, help="seconds per tool")
    arguments = parser.parse_args()
    library = arguments.library.resolve()
    environment = os.environ | {"DIJIANG_KERNELS": str(library)}

    # pytest-benchmark, where it is installed, warns beside xdist, and warnings are errors.
    options = ["-q", "-rfEsP", "--tb=short", "-p", "no:benchmark", *shlex.split(arguments.pytest)]
    tests = [sys.executable, "-m", "pytest", *options]
    ran = subprocess.run(
        [*tests, *TESTS], env=environment, capture_output=True, text=True, cwd=ROOT, check=False
    )
    sanitize = [sys.executable, str(HERE / "sanitize.py"), str(library), f"--timeout={arguments.timeout}"]
    if arguments.built:
        sanitize.append(f"--built={arguments.built}")
    lines = ran.stdout.splitlines()
    told = sorted({x for x in lines if re.match(r"(steps|prefill) float|(neox|tiny)-\S+ \S+, \d+ calls", x)})
    record = [
        f"Record of a run of tests/gpu/record.py on {datetime.now(timezone.utc):%Y-%m-%d}.",
        *machine(library, arguments.commit), "",
        f"$ pytest {' '.join(TESTS)}", *[x for x in lines if x.startswith(("FAILED", "ERROR"))], lines[-1],
        "", *largest_errors(ran.stdout), "",
        "100,000 tokens: states relative to each head's largest entry (γ = 511/512, 1 - 1e-9, 1, 0.95),",
        "beyond what rounded operands do; outputs of tokens 1, 2, 100, 1000, 10000, 50000, 100000",
        "relative to their scale. Whole models: logits relative to their spread.", *told, "",
        "$ python tests/gpu/sanitize.py libdijiang_kernels.so",
    ]  # fmt: skip
    # What is known is written before the sanitizers begin, which may take long.
    arguments.out.with_suffix(".pytest").write_text(ran.stdout + ran.stderr, encoding="utf-8")
    arguments.out.write_text("\n".join(record) + "\n", encoding="utf-8")
    print("\n".join(record), flush=True)
    with arguments.out.open("a", encoding="utf-8") as file:
        checked = subprocess.run(
            sanitize, env=environment | {"PYTHONUNBUFFERED": "1"}, stdout=file, check=False
        )
    print("".join(arguments.out.read_text(encoding="utf-8").splitlines(keepends=True)[len(record) :]))
    return 1 if ran.returncode or checked.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
