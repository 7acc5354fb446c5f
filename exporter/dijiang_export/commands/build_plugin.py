"""`dijiang-export build-plugin`: compile the CUDA kernels and the TensorRT plugin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from dijiang_export.commands.arguments import COUNT, PATH, takes
from dijiang_export.commands.common import Output

if TYPE_CHECKING:
    from dijiang_engines.plugin.build import BuildResult


@dataclass(frozen=True)
class BuildPluginArguments:
    """What `build-plugin` is given."""

    architectures: Annotated[
        tuple[str, ...],
        click.option(
            "--architecture", "architectures", multiple=True, metavar="ARCH",
            help="GPU to compile for: 87, sm_87 or 8.7, may be repeated; all: every tuned one that nvcc "
            "knows. Default: this machine's GPUs.",
        ),
    ]  # fmt: skip
    target: Annotated[
        str | None,
        click.option(
            "--target", metavar="MACHINE|FOLDER",
            help="Compile for another kind of processor: aarch64 (Jetson, Arm servers), or a folder with "
            "CUDA for it. Default: this machine's own.",
        ),
    ]  # fmt: skip
    tensorrt_include: Annotated[
        Path | None,
        click.option(
            "--tensorrt-include", type=PATH,
            help="Folder with NvInfer.h. Default: $TENSORRT_ROOT, or where JetPack and Debian packages put "
            "it.",
        ),
    ]  # fmt: skip
    kernels_only: Annotated[
        bool,
        click.option(
            "--kernels-only", is_flag=True, help="Build no TensorRT plugin: needs no TensorRT."
        ),
    ]  # fmt: skip
    folder: Annotated[
        Path | None,
        click.option("--output", "folder", type=PATH, help="Also copy the result to this folder."),
    ]
    jobs: Annotated[
        int | None, click.option("--jobs", type=COUNT, help="Compilers at a time. Default: one per CPU.")
    ]
    force: Annotated[
        bool,
        click.option("--force", is_flag=True, help="Compile even if nothing changed since the last time."),
    ]


@click.command("build-plugin", epilog="Example: dijiang-export build-plugin --architecture 87 --jobs 2")
@takes(BuildPluginArguments)
def build_plugin(output: Output, given: BuildPluginArguments) -> None:
    """Compile the CUDA kernels and, for TensorRT, the plugin around them.

    Needs the CUDA toolkit (12.0 or newer), a C++ compiler, CMake, and TensorRT's headers. The result is kept
    in a cache, from which the other commands load it, and is used again as long as nothing changes.
    """
    result = _build(given, output)
    built = result.built
    where = given.folder or built.folder
    output.print_result(
        {
            "folder": where,
            "reused": result.reused,
            "seconds": round(result.seconds, 1),
            "architectures": built.architectures,
            "machine": built.machine,
            "cuda": built.cuda,
            "tensorrt": built.tensorrt,
            "libraries": built.libraries,
            "sources": built.sources,
        },
        lambda: _describe(result, where),
    )


def _build(given: BuildPluginArguments, output: Output) -> BuildResult:
    from dijiang_engines.plugin.build import build, copy_build
    from dijiang_engines.plugin.requirements import find_requirements

    needed = find_requirements(
        architectures=given.architectures,
        kernels_only=given.kernels_only,
        tensorrt_include=given.tensorrt_include,
        target=given.target,
    )
    result = build(needed, force=given.force, jobs=given.jobs, progress=output.progress, log=output.log)
    if given.folder is not None:
        copy_build(result.built, given.folder)
    return result


def _describe(result: BuildResult, where: Path) -> str:
    built = result.built
    done = "nothing changed; built before" if result.reused else f"built in {result.seconds:.0f} s"
    machine = f" on {built.machine}" if built.is_foreign else ""
    lines = [f"{where}: {done}", f"for {', '.join(built.architectures)}{machine}, CUDA {built.cuda}"]
    lines += [f"  {name}" for name in built.libraries]
    if built.tensorrt is not None:
        lines.append(f"the plugin is for TensorRT {built.tensorrt_major} (headers of {built.tensorrt})")
    if built.is_foreign:
        lines.append("copy the folder to the other machine, where DIJIANG_PLUGIN names it")
    return "\n".join(lines)
