"""`dijiang-export bench products`: the CUDA kernels' matrix products, of few rows and of many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import click

from dijiang_export.commands.arguments import COUNT, KernelLibrary, KernelSeconds, Save, one_of, takes
from dijiang_export.commands.bench.cells import EveryWeights, HalfType, measure_and_show
from dijiang_export.commands.common import Output

Shape = Literal["410m", "1b", "2.8b"]


@dataclass(frozen=True)
class BenchProductsArguments:
    """What `bench products` is given."""

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
            "--rows", type=COUNT, multiple=True,
            help="Of every product's input, repeatable. [default: 1, 8, 64, 2048]",
        ),
    ]  # fmt: skip
    dtype: HalfType
    library: KernelLibrary
    seconds: KernelSeconds
    save: Save


@click.command(
    "products",
    short_help="Measure matrix products of the CUDA kernels (needs an NVIDIA GPU).",
    epilog="Example: dijiang-export bench products --shape 410m --rows 2048 --save products.json",
)
@takes(BenchProductsArguments)
def products(output: Output, given: BenchProductsArguments) -> None:
    """Measure the matrix products around attention on this GPU, as engines call them.

    Up to 16 rows those of a whole step; of more, as a prefill or a large batch has them, those of eight
    layers. Weights are random and have the shapes of Pythia. Ours are first compared with float64; what
    computes something else is not timed, and fails the command. Beside them: cuBLAS, and for int4 PyTorch's
    tinygemm.
    """
    from dijiang_export.bench.products.cells import Cell
    from dijiang_export.bench.products.gpu import ProductsGpu
    from dijiang_export.bench.products.tables import draw_products

    cells = [
        Cell(shape, weights, rows)
        for shape in dict.fromkeys(given.shapes or ("410m", "2.8b"))
        for weights in dict.fromkeys(given.weights or ("float", "int8", "int4"))
        for rows in dict.fromkeys(given.rows or (1, 8, 64, 2048))
    ]
    measure_and_show(
        output, ProductsGpu(given.dtype, given.library), cells, "Measuring products", seconds=given.seconds,
        save=given.save, draw=draw_products,
    )  # fmt: skip
