"""`dijiang-export build-plugin`: compile the CUDA kernels and the TensorRT plugin for this machine."""

from __future__ import annotations

from pathlib import Path

import click

from dijiang_export.commands.common import Output, output_options


@click.command("build-plugin", epilog="Example: dijiang-export build-plugin --architecture 87 --jobs 2")
@click.option(
    "--architecture",
    "architectures",
    multiple=True,
    metavar="ARCH",
    help="GPU to compile for: 87, sm_87 or 8.7, may be repeated; all: every tuned one that nvcc knows. "
    "Default: this machine's GPUs.",
)
@click.option(
    "--tensorrt-include",
    type=click.Path(path_type=Path),
    help="Folder with NvInfer.h. Default: $TENSORRT_ROOT, or where JetPack and Debian packages put it.",
)
@click.option("--kernels-only", is_flag=True, help="Build no TensorRT plugin: needs no TensorRT.")
@click.option(
    "--output", "folder", type=click.Path(path_type=Path), help="Also copy the result to this folder."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Compilers at a time. Default: one per CPU.")
@click.option("--force", is_flag=True, help="Compile even if nothing changed since the last time.")
@output_options
def build_plugin(
    output: Output,
    architectures: tuple[str, ...],
    tensorrt_include: Path | None,
    kernels_only: bool,
    folder: Path | None,
    jobs: int | None,
    force: bool,
) -> None:
    """Compile the CUDA kernels and, for TensorRT, the plugin around them.

    Needs the CUDA toolkit (12.0 or newer), a C++ compiler, CMake, and TensorRT's headers. The result is kept
    in a cache, from which the other commands load it, and is used again as long as nothing changes.
    """
    from dijiang_engines.plugin.build import build, copy_build
    from dijiang_engines.plugin.requirements import plan_build

    plan = plan_build(
        architectures=architectures, kernels_only=kernels_only, tensorrt_include=tensorrt_include
    )
    result = build(plan, force=force, jobs=jobs, progress=output.progress, log=output.log)
    if folder is not None:
        copy_build(result.built, folder)
    built = result.built
    where = built.folder if folder is None else folder

    def describe() -> str:
        done = "nothing changed; built before" if result.reused else f"built in {result.seconds:.0f} s"
        lines = [f"{where}: {done}", f"for {', '.join(built.architectures)}, CUDA {built.cuda}"]
        lines += [f"  {name}" for name in built.libraries]
        if built.tensorrt is not None:
            lines.append(f"the plugin is for TensorRT {built.tensorrt_major} (headers of {built.tensorrt})")
        return "\n".join(lines)

    output.print_result(
        {
            "folder": where,
            "reused": result.reused,
            "seconds": round(result.seconds, 1),
            "architectures": built.architectures,
            "cuda": built.cuda,
            "tensorrt": built.tensorrt,
            "libraries": built.libraries,
            "sources": built.sources,
        },
        describe,
    )
