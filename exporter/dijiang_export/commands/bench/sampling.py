"""`dijiang-export bench sampling`: choosing tokens on the GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import click

from dijiang_export.commands.arguments import COUNT, KernelLibrary, KernelSeconds, Save, one_of, takes
from dijiang_export.commands.bench.cells import measure_and_show
from dijiang_export.commands.common import Output

Choice = Literal["greedy", "temperature", "top-k", "top-p", "top-k-top-p", "all"]


@dataclass(frozen=True)
class BenchSamplingArguments:
    """What `bench sampling` is given."""

    choices: Annotated[
        tuple[Choice, ...],
        click.option(
            "--choice", "choices", type=one_of(Choice), multiple=True,
            help="How tokens are chosen, repeatable. [default: all of them]",
        ),
    ]  # fmt: skip
    vocabularies: Annotated[
        tuple[int, ...],
        click.option(
            "--vocabulary", "vocabularies", type=click.IntRange(512), multiple=True,
            help="Tokens, repeatable. [default: 50304]",
        ),
    ]  # fmt: skip
    rows: Annotated[
        tuple[int, ...],
        click.option("--rows", type=COUNT, multiple=True, help="Repeatable. [default: 1, 8, 64]"),
    ]
    library: KernelLibrary
    seconds: KernelSeconds
    save: Save


@click.command(
    "sampling",
    short_help="Measure how tokens are chosen by the CUDA kernels (needs an NVIDIA GPU).",
    epilog="Example: dijiang-export bench sampling --choice top-p --rows 1 --save sampling.json",
)
@takes(BenchSamplingArguments)
def sampling(output: Output, given: BenchSamplingArguments) -> None:
    """Measure how long this GPU takes to choose a token of each row from its logits.

    Ours are first compared with the choices on the host, of the same random numbers; what chooses others is
    not timed, and fails the command. Beside them: PyTorch's operators, as they are and through torch.compile.
    """
    from dijiang_export.bench.sampling.cells import Cell
    from dijiang_export.bench.sampling.gpu import SamplingGpu
    from dijiang_export.bench.sampling.tables import draw_choices

    cells = [
        Cell(vocabulary, rows, choice)
        for vocabulary in dict.fromkeys(given.vocabularies or (50304,))
        for rows in dict.fromkeys(given.rows or (1, 8, 64))
        for choice in dict.fromkeys(
            given.choices or ("greedy", "temperature", "top-k", "top-p", "top-k-top-p", "all")
        )
    ]
    measure_and_show(
        output, SamplingGpu(given.library), cells, "Measuring sampling", seconds=given.seconds,
        save=given.save, draw=draw_choices,
    )  # fmt: skip
