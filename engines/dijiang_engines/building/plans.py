"""Which TensorRT plans a bundle and a recipe make: their files, their graphs, the sizes that they take."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dijiang_engines.building.plugin_products import MAX_BATCH, MAX_INPUT_BYTES
from dijiang_engines.building.recipes import AUTO, PLUGIN, Recipe
from dijiang_engines.building.request import Profile
from dijiang_engines.errors import KernelError, UsageError
from dijiang_engines.formats.bundle import Bundle
from dijiang_engines.formats.engine import LAYOUTS, Profiles
from dijiang_engines.io_names import INPUT_IDS, POSITIONS, SEQ_LENS, past_state
from dijiang_engines.kernels.step import MAX_ROWS, StepModel


def check_fit(bundle: Bundle, recipe: Recipe, precision: str | None) -> None:
    """Compare a bundle's precision with what was asked for and what the recipe is meant for.

    Raises:
        UsageError: they do not fit.
    """
    if precision is not None and precision != bundle.dtype:
        raise UsageError(
            "the bundle has another precision than was asked for",
            got=bundle.dtype, expected=precision,
            hint=f"export the checkpoint again with `--dtype {precision}`",
        )  # fmt: skip
    if bundle.dtype not in recipe.precisions:
        raise UsageError(
            f"the recipe {recipe.name} is not meant for this bundle's precision",
            got=bundle.dtype, expected=" or ".join(recipe.precisions),
            hint=f"export the checkpoint again with `--dtype {recipe.precisions[0]}`",
        )  # fmt: skip


class PlanSource(NamedTuple):
    """What one plan is made from."""

    file: str
    """The plan's."""
    graph: str
    """The bundle's name for the graph."""
    profiles: list[Profile]


def plans(bundle: Bundle, recipe: Recipe, *, standard: bool = False) -> Iterator[PlanSource]:
    """The plans that there will be.

    Args:
        bundle: for which model.
        recipe: for which sizes, in one plan or two.
        standard: of the graphs in standard operators, not of those with the plugin's node.
    """
    context = profile_shapes(bundle, recipe.profiles, step=False)
    generation = profile_shapes(bundle, recipe.profiles, step=True)
    files, suffix = LAYOUTS[recipe.layout], "" if standard else "_trt"
    if recipe.layout == "one":
        yield PlanSource(files[0], f"prefill{suffix}", [context, generation])
    else:
        yield PlanSource(files[0], f"prefill{suffix}", [context])
        yield PlanSource(files[1], f"step{suffix}", [generation])


def plugin_multiplies(bundle: Bundle, recipe: Recipe, *, step: bool) -> bool:
    """May a plan's products with float16 weights be the plugin's?

    Args:
        bundle: of the model.
        recipe: says who multiplies; "auto" may.
        step: a step plan of its own, whose kernels are for few rows, with norms; else one that reads prompts
            too, in which cuBLASLt multiplies many rows.
    """
    if not step:
        return recipe.prefill_products in (PLUGIN, AUTO) and bundle.dtype == "float16"
    if recipe.step_products != PLUGIN or bundle.dtype != "float16" or recipe.max_batch > MAX_BATCH:
        return False
    spec = bundle.spec
    width = spec.intermediate_size + (spec.hidden_size if spec.parallel_residual else 0)
    return recipe.max_batch * max(width, spec.hidden_size) * 2 <= MAX_INPUT_BYTES


def no_one_launch(bundle: Bundle, recipe: Recipe, *, ahead_of_time: bool = False) -> str | None:
    """Why a step plan cannot be one launch, as far as that is known before it is built; None: it may.

    Args:
        bundle: of the model.
        recipe: for how many sequences.
        ahead_of_time: the builder needs no GPU.
    """
    if ahead_of_time:
        return (
            "weights are packed for the number of multiprocessors of the GPU that runs them, and none is here"
        )
    if recipe.max_batch > MAX_ROWS:
        return f"up to {recipe.max_batch} sequences; expected at most {MAX_ROWS}"
    try:
        StepModel.of(bundle.spec, bundle.dtype, bundle.quantised)
    except KernelError as error:
        return error.sentence()
    return None


def profile_shapes(bundle: Bundle, sizes: Profiles, *, step: bool) -> Profile:
    """Least, best and most shape of every input: for prefill any length, for steps one token."""
    lengths = (1, 1, 1) if step else (1, sizes.opt_length, sizes.max_length)
    batches = (1, sizes.opt_batch, sizes.max_batch)
    spec = bundle.spec
    shapes: Profile = {
        INPUT_IDS: [[b, n] for b, n in zip(batches, lengths, strict=True)],
        POSITIONS: [[b] for b in batches],
        SEQ_LENS: [[b] for b in batches],
    }
    for layer in range(spec.num_layers):
        shapes[past_state(layer)] = [[b, *spec.state_shape] for b in batches]
    return shapes
