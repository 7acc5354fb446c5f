"""The whole TensorRT path on this machine, and a summary to paste: `python engine_test.py`.

Builds the plugin, exports the trained sample in each type, records what PyTorch generates, and for every type
and layout builds an engine, validates it, and runs tests/gpu/engine.py on it; with TensorRT for RTX from the
standard graphs and with the plugin. Each part's output is a file in the work folder. Ends with one block of
text that says what ran on what. Exits with 0 if all went well; with 1 if something failed, or if TensorRT or
a GPU is missing, which is one sentence.

DIJIANG_PLUGIN        names a build of the plugin to use instead of making one
CUDA_VISIBLE_DEVICES  which GPU, where there are several
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SAMPLE = ROOT / "samples/tiny-stdlib"
LAST_WORDS = 12
"""Lines of a failed part's log that are shown."""
FACTS_SECONDS = 300

# Runs in the Python with TensorRT. One JSON object on the last line, either facts or why there are none.
FACTS = """
import json, platform, sys
from dijiang_engines.nvidia.cuda import Cuda
from dijiang_engines.errors import DijiangError
from dijiang_engines.machine import package_version
from dijiang_engines.building.target import choose_runtime
from dijiang_engines.nvidia.tensorrt_library import check_capability, tensorrt_module, tensorrt_version
from dijiang_engines.nvidia.tensorrt_versions import RUNTIMES, capability_text, dialect_of
try:
    runtime = choose_runtime(sys.argv[1] or None)
    trt = tensorrt_module(runtime)
    facts = Cuda().facts()
    version = tensorrt_version(trt, runtime)
    check_capability(dialect_of(version, runtime), facts.compute_capability)
    found = {
        "runtime": runtime, "title": RUNTIMES[runtime].title,
        "capability": capability_text(facts.compute_capability),
        "python": platform.python_version(), "tensorrt": version, "bindings": trt.__version__,
        "polygraphy": package_version("polygraphy"), "cuda-bindings": package_version("cuda-bindings"),
        "gpu": facts.name, "compute_capability": facts.compute_capability, "memory_bytes": facts.memory_bytes,
        "cuda_driver": facts.driver, "cuda_runtime": facts.runtime,
    }
except DijiangError as error:
    found = {"what": error.what, "got": str(error.got or ""), "hint": error.hint}
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Part:
    """One thing that was run, and how it went."""

    name: str
    result: str
    """"ok", "FAIL", or "not run"."""
    seconds: float
    detail: str = ""


class EngineTest:
    """The parts, one after the other.

    Args:
        arguments: see `parse`.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.work: Path = arguments.work.resolve()
        self.python: str = arguments.engine_python
        self.greedy: Path | None = arguments.greedy
        self.bundles: Path | None = arguments.bundles
        self.dtypes: list[str] = arguments.dtypes
        self.layouts: list[str] = arguments.layouts
        self.runtime: str = arguments.runtime
        self.graphs: list[str] = arguments.graphs
        self.skip: list[str] = arguments.skip
        self.step: str | None = arguments.step
        self.parts: list[Part] = []
        self.plugin = "no engine was built"
        """What the plugin was compiled with."""
        path = [str(ROOT / "engines"), str(ROOT / "exporter"), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in path if p)}

    def facts(self) -> dict[str, Any]:
        """What TensorRT and GPU there are, or {"what", "got", "hint"}. Asked in a process of its own."""
        try:
            done = subprocess.run(
                [self.python, "-c", FACTS, self.runtime], env=self.environment, stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=FACTS_SECONDS, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            return {"what": f"cannot run {self.python}", "got": str(error), "hint": None}
        lines = done.stdout.strip().splitlines()
        if done.returncode == 0 and lines:
            return dict(json.loads(lines[-1]))
        words = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return {"what": "TensorRT or CUDA ended its process", "got": words[0], "hint": None}

    def run(self, name: str, *command: str | Path) -> bool:
        """Run one part, its output into a file; True if it exits with 0."""
        log = self.work / (name.replace(" ", "-") + ".log")
        print(f"== {name} ...", flush=True)
        start = time.perf_counter()
        with log.open("w", encoding="utf-8") as file:
            file.write("$ " + " ".join(map(str, command)) + "\n")
            file.flush()
            status = subprocess.run(
                [str(word) for word in command], cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, check=False,
            ).returncode  # fmt: skip
        seconds = time.perf_counter() - start
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[1:]
        good = status == 0
        if not good:
            print("\n".join(lines[-LAST_WORDS:]), flush=True)
        print(f"   {'ok' if good else f'FAIL, exit code {status}'} after {seconds:.0f} s", flush=True)
        detail = (
            "" if good else next((text for text in lines if "error" in text.lower()), f"exit code {status}")
        )
        failed = [text.removeprefix("FAIL ").split(":")[0] for text in lines if text.startswith("FAIL ")]
        if failed and not good:
            detail = ", ".join(failed)
        self.parts.append(Part(name, "ok" if good else "FAIL", seconds, detail.strip()[:120]))
        return good

    def missing(self, name: str, needs: str) -> None:
        """Note a part that could not be run."""
        self.parts.append(Part(name, "not run", 0, f"needs {needs}"))

    def cli(self, python: str, *arguments: str | Path) -> list[str | Path]:
        """A command of dijiang-export, in this checkout's code."""
        return [python, "-m", "dijiang_export", "--quiet", *arguments]

    def everything(self, facts: dict[str, Any]) -> None:
        """All parts; what does not depend on a failed one still runs.

        Args:
            facts: what `facts` found.
        """
        rtx = facts["runtime"] == "tensorrt-rtx"
        target = ["--runtime", facts["runtime"]]
        if rtx:
            target += ["--compute-capability", facts["capability"]]
        kinds = self.graphs if rtx else ["plugin"]
        plugin = bool(os.environ.get("DIJIANG_PLUGIN")) or (
            "plugin" in kinds and self.run("build plugin", *self.cli(sys.executable, "build-plugin"))
        )
        greedy = self.greedy
        if greedy is None and self.run(
            "record pytorch", sys.executable, HERE / "greedy.py", SAMPLE, self.work / "greedy.json"
        ):
            greedy = self.work / "greedy.json"
        for dtype in self.dtypes:
            bundle = (self.bundles or self.work) / f"tiny-stdlib-{dtype}.bundle"
            exported = self.bundles is not None or self.run(
                f"export {dtype}",
                *self.cli(sys.executable, "to-onnx", SAMPLE, bundle, "--dtype", dtype, "--force"),
            )
            for layout in self.layouts:
                for kind in kinds:
                    name = f"{dtype} {layout}" + (f" {kind}" if rtx else "")
                    options = [*target, "--layout", layout, *(["--no-plugin"] if kind == "standard" else [])]
                    if self.step is not None and layout == "two" and dtype != "float32":
                        options += ["--step", self.step]
                        name += f" {self.step}"
                    possible = exported and (plugin or kind == "standard")
                    self._engine(name, bundle, options, possible, greedy)

    def _engine(
        self, name: str, bundle: Path, options: list[str], possible: bool, greedy: Path | None
    ) -> None:
        engine = self.work / (name.replace(" ", "-") + ".engine")
        names = [f"{what} {name}" for what in ("build", "validate", "check")]
        if not possible or not self.run(
            names[0],
            *self.cli(self.python, "build-engine", bundle, "-o", engine, *options, "--no-validate"),
            "--force",
        ):  # fmt: skip
            if not possible:
                self.missing(names[0], "the plugin and the bundle")
            for other in names[1:]:
                self.missing(other, "the engine")
            return
        report = engine.with_suffix(".html")
        self.run(names[1], *self.cli(self.python, "validate", engine, "--report", report, "--force"))
        command: list[str | Path] = [self.python, HERE / "engine.py", engine]
        command += ["--save", engine.with_suffix(".json")]
        if greedy is not None:
            command += ["--greedy", greedy]
        self.run(names[2], *command, *(["--skip", *self.skip] if self.skip else []))
        self.plugin = _plugin_of(engine) or self.plugin


def _plugin_of(engine: Path) -> str | None:
    try:
        made = json.loads((engine / "engine.json").read_text(encoding="utf-8"))["made_with"]
        if made["plugin_cuda"] is None:
            return None
        return f"CUDA {made['plugin_cuda']}, headers of TensorRT {made['plugin_tensorrt_headers']}"
    except (OSError, ValueError, KeyError):
        return None


def summary(facts: dict[str, Any], parts: Sequence[Part], plugin: str) -> str:
    """One block of text about machine and results."""
    from dijiang_engines.machine import describe_machine
    from dijiang_engines.version import __version__

    machine = describe_machine()
    driver = next((gpu.driver for gpu in machine.gpus if gpu.driver), "unknown")
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    lines = [
        "----- dijiang-export engine test -----",
        f"dijiang-export {__version__}{f', commit {commit}' if commit else ''}",
        f"GPU: {facts['gpu']}, sm_{facts['compute_capability']}, {facts['memory_bytes'] / 2**30:.1f} GiB; "
        f"driver {driver}",
        f"{facts['title']} {facts['tensorrt']} (bindings {facts['bindings']}); "
        f"Polygraphy {facts['polygraphy']}",
        f"CUDA: driver's {facts['cuda_driver']}, runtime {facts['cuda_runtime']}, "
        f"cuda-bindings {facts['cuda-bindings']}",
        f"plugin: {plugin}",
        f"{machine.system}, {machine.architecture}; {machine.board or machine.cpu}; Python {facts['python']}",
    ]
    for part in parts:
        lines.append(f"{part.result:8} {part.name:24} {part.seconds:7.1f} s  {part.detail}".rstrip())
    bad = sum(part.result != "ok" for part in parts)
    lines.append("all right" if not bad else f"not all right: {bad} of {len(parts)} parts")
    return "\n".join([*lines, "----- end -----"])


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "build/engine-test", help="where everything goes")
    parser.add_argument(
        "--engine-python", default=sys.executable,
        help="the Python with TensorRT, Polygraphy and cuda-bindings; default: this one",
    )  # fmt: skip
    parser.add_argument(
        "--bundles", type=Path,
        help="a folder with tiny-stdlib-float32.bundle and the like, if they were exported elsewhere",
    )  # fmt: skip
    parser.add_argument("--greedy", type=Path, help="greedy.py's record, if it was made elsewhere")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "float16"], choices=["float32", "float16", "bfloat16"]
    )
    parser.add_argument("--layouts", nargs="+", default=["one", "two"], choices=["one", "two"])
    parser.add_argument(
        "--runtime", default="", choices=["tensorrt", "tensorrt-rtx"],
        help="default: what that Python has, TensorRT first",
    )  # fmt: skip
    parser.add_argument(
        "--graphs", nargs="+", default=["standard", "plugin"], choices=["standard", "plugin"],
        help="TensorRT for RTX: which graphs; `standard` needs no compiler and no headers",
    )  # fmt: skip
    parser.add_argument(
        "--step", choices=["products", "one-launch", "auto"],
        help="build-engine's, of float16 and bfloat16 in layout two; default: build-engine's default",
    )  # fmt: skip
    parser.add_argument("--skip", nargs="*", default=[], help="checks that engine.py leaves out")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run everything."""
    test = EngineTest(parse(words))
    facts = test.facts()
    if "what" in facts:
        got = f" ({facts['got']})" if facts["got"] else ""
        hint = f"\nhint: {facts['hint']}" if facts["hint"] else ""
        print(f"engine-test needs TensorRT and an NVIDIA GPU: {facts['what']}{got}{hint}", file=sys.stderr)
        return 1
    test.work.mkdir(parents=True, exist_ok=True)
    test.everything(facts)
    text = summary(facts, test.parts, test.plugin)
    (test.work / "summary.txt").write_text(text + "\n", encoding="utf-8")
    print(f"\n{text}\n\nLogs, reports and engines are in {test.work}", flush=True)
    return 0 if all(part.result == "ok" for part in test.parts) else 1


if __name__ == "__main__":
    sys.exit(main())
