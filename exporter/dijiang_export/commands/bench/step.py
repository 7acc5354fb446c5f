"""`dijiang-export bench step`: a whole decoding step of the CUDA kernels, and what bounds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import click

from dijiang_export.commands.arguments import KernelLibrary, KernelSeconds, Save, one_of, takes
from dijiang_export.commands.bench.cells import EveryWeights, HalfType, measure_and_show
from dijiang_export.commands.common import Output

Shape = Literal["410m", "1b", "2.8b", "smollm2-135m"]


@dataclass(frozen=True)
class BenchStepArguments:
    """What `bench step` is given."""

    shapes: Annotated[
        tuple[Shape, ...],
        click.option(
            "--shape", "shapes", type=one_of(Shape), multiple=True, help="Repeatable. [default: 410m, 2.8b]"
        ),
    ]
    weights: EveryWeights
    rows: Annotated[
        tuple[int, ...],
        click.option(
            "--rows", type=click.IntRange(1, 8), multiple=True,
            help="Sequences at once, repeatable. [default: 1, 8]",
        ),
    ]  # fmt: skip
    dtype: HalfType
    library: KernelLibrary
    seconds: KernelSeconds
    save: Save


@click.command(
    "step",
    short_help="Measure a decoding step of the CUDA kernels (needs an NVIDIA GPU).",
    epilog="Example: dijiang-export bench step --shape 410m --rows 1 --save step.json",
)
@takes(BenchStepArguments)
def step(output: Output, given: BenchStepArguments) -> None:
    """Measure a model's decoding step on this GPU: in one launch, in three a layer, and others' products.

    Models have random weights and the shapes of Pythia or SmolLM2. Ours are first compared with the reference
    in float64; what computes something else is not timed, and fails the command. Beside them: cuBLAS, for
    int4 PyTorch's tinygemm, and the time that reading the weights must take.
    """
    from dijiang_export.bench.step.gpu import StepGpu
    from dijiang_export.bench.step.shapes import Cell
    from dijiang_export.bench.step.tables import draw_steps

    cells = [
        Cell(shape, weights, rows)
        for shape in dict.fromkeys(given.shapes or ("410m", "2.8b"))
        for weights in dict.fromkeys(given.weights or ("float", "int8", "int4"))
        for rows in dict.fromkeys(given.rows or (1, 8))
    ]
    measure_and_show(
        output, StepGpu(given.dtype, given.library), cells, "Measuring steps", seconds=given.seconds,
        save=given.save, draw=draw_steps,
    )  # fmt: skip
