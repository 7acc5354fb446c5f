"""The kernels, compiled for arm64 on another machine: what the libraries hold, need and export."""

from __future__ import annotations

import json
import re
from pathlib import Path

from support.arm64 import CUDA, FOLDER, FORM, TOOLS, check_symbols, python
from support.makers.plugin_builds import run
from support.paths import ROOT

from dijiang_engines.plugin.cache import KERNELS, BuiltPlugin
from dijiang_engines.plugin.elf import machine_of


def test_the_record_says_what_it_is_for(kernels: BuiltPlugin) -> None:
    wanted = ("sm_87", "sm_110", "compute_110") if FORM == "whole" else ("sm_87", "compute_87")
    assert (kernels.machine, kernels.architectures) == ("aarch64", wanted)
    assert kernels.is_foreign
    record = json.loads((kernels.folder / "plugin.json").read_text())
    assert Path(record["cuda_target"]).is_relative_to(CUDA)


def test_the_library_is_for_it_and_for_older_systems(kernels: BuiltPlugin) -> None:
    library = kernels.library(KERNELS)
    assert machine_of(library) == "aarch64"
    check_symbols(library)


def test_it_exports_the_c_abi_and_nothing_else(kernels: BuiltPlugin) -> None:
    headers = (ROOT / "plugins/include/dijiang").glob("*.h")
    text = "\n".join(re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL) for path in headers)
    declared = set(re.findall(r"DIJIANG_API[^;(]*?(dijiang_\w+)\(", text))
    out = run(f"{TOOLS}nm", "--dynamic", "--defined-only", kernels.library(KERNELS))
    assert {line.split()[-1] for line in out.splitlines() if line.strip()} == declared


def test_this_machine_takes_it_for_what_it_is(kernels: BuiltPlugin) -> None:
    """doctor does not count it, and opening it says why it cannot be."""
    found = json.loads(python("-m", "dijiang_export", "doctor", "--json"))["plugin"]["built"]
    assert {built["machine"] for built in found if built["folder"].startswith(str(FOLDER))} == {"aarch64"}
    assert "foreign" in {built["state"] for built in found}  # others may be of earlier sources
    assert "current" not in {built["state"] for built in found}
    script = (
        "import sys; from pathlib import Path; from dijiang_engines.errors import KernelError\n"
        "from dijiang_engines.kernels.library import Library\n"
        "try: Library(Path(sys.argv[1]))\n"
        "except KernelError as error: print(error.got)"
    )
    assert python("-c", script, str(kernels.library(KERNELS))) == "aarch64\n"
