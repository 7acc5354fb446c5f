"""Turn what `ptxas -v` said about each kernel into a table. Standard library only.

usage: resource_report.py --text REPORT.txt --json REPORT.json OBJECT...

Reads OBJECT.ptxas beside each object, if there is one. JSON: a list of
{"kernel": demangled name, "file": source file's name, "architecture": "sm_90", "registers": per thread,
 "stack", "spill_stores", "spill_loads", "shared": bytes}, in the table's order: the worst spills first.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

COLUMNS = ("registers", "stack", "spill_stores", "spill_loads", "shared")


def read_log(text: str, file: str) -> list[dict[str, Any]]:
    """The kernels in one log; device functions that were not inlined count to none."""
    kernels: list[dict[str, Any]] = []
    current: dict[str, Any] | None = None
    frame = ""  # of the entry function or of a function that it calls
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(.+)' for '(\w+)'", line):
            current = dict.fromkeys(COLUMNS, 0)
            current |= {"kernel": match[1], "file": file, "architecture": match[2]}
            kernels.append(current)
        elif match := re.search(r"Function properties for (\S+)", line):
            frame = match[1]
        elif current is None:
            continue
        elif match := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            if frame == current["kernel"]:
                current |= dict(zip(COLUMNS[1:4], map(int, match.groups()), strict=True))
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            current |= {"registers": int(match[1]), "shared": int(shared[1]) if shared else 0}
    return kernels


def demangle(names: list[str]) -> dict[str, str]:
    """Mangled -> readable, where a demangler is there."""
    tool = shutil.which("cu++filt") or shutil.which("c++filt")
    if tool is None or not names:
        return {}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=False)
    readable = done.stdout.splitlines()
    return dict(zip(names, readable, strict=True)) if len(readable) == len(names) else {}


def short(name: str) -> str:
    """Without the return type, the namespaces' common part and the parameters."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("<unnamed>::", "")
    depth = 0
    for index, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            name = name[:index]
            break
    name = re.sub(r"\((?:int|unsigned int|bool|[\w:]+)\)(\d+)", r"\1", name)  # (int)64 -> 64
    return name.replace("dijiang::", "")


def order(kernel: dict[str, Any]) -> tuple[int, str, str, int]:
    """The worst spills first, then by name and architecture."""
    number = re.sub(r"\D", "", kernel["architecture"])
    return -kernel["spill_stores"] - kernel["spill_loads"], kernel["file"], kernel["kernel"], int(number)


def main() -> None:
    """Write both reports."""
    parser = argparse.ArgumentParser(description="Registers and spills of every kernel.")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("objects", type=Path, nargs="+")
    options = parser.parse_args()
    kernels: list[dict[str, Any]] = []
    for path in options.objects:
        log = path.with_name(path.name + ".ptxas")
        if log.exists():
            kernels += read_log(log.read_text(errors="replace"), path.stem)
    readable = demangle([kernel["kernel"] for kernel in kernels])
    for kernel in kernels:
        kernel["kernel"] = short(readable.get(kernel["kernel"], kernel["kernel"]))
    kernels.sort(key=order)
    lines = [f"{'architecture':13}{'registers':>10}{'stack':>8}{'spills':>8}{'shared':>8}  kernel"]
    for k in kernels:
        spills = k["spill_stores"] + k["spill_loads"]
        row = f"{k['architecture']:13}{k['registers']:>10}{k['stack']:>8}{spills:>8}{k['shared']:>8}"
        lines.append(f"{row}  {k['file']}: {k['kernel']}")
    options.text.write_text("\n".join(lines) + "\n")
    options.json.write_text(json.dumps(kernels, indent=1) + "\n")


if __name__ == "__main__":
    main()
