"""Recipes: what to build an engine for, as data. `recipes/*.toml`, or a file of the user's."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dijiang_engines.errors import UsageError
from dijiang_engines.formats.engine import LAYOUTS, Profiles
from dijiang_engines.formats.safe_files import LIMITS, parse_toml, read_bounded
from dijiang_engines.nvidia.tensorrt_versions import TENSORRT, TENSORRT_RTX
from dijiang_engines.op_contract import T_TYPES

FOLDER = Path(__file__).parent / "recipes"
DEFAULTS = {TENSORRT: "datacenter", TENSORRT_RTX: "rtx"}
"""The recipe that is taken if none is named, by runtime."""
PLUGIN = "plugin"
MULTIPLIERS = (PLUGIN, "tensorrt")
PRODUCTS, ONE_LAUNCH, AUTO = "products", "one-launch", "auto"
STEPS = (PRODUCTS, ONE_LAUNCH, AUTO)


@dataclass(frozen=True)
class Recipe:
    """How an engine is built. Raises UsageError for a value that makes no sense."""

    name: str
    description: str = ""
    precisions: tuple[str, ...] = T_TYPES
    """Bundle types that the target is meant for."""
    architectures: tuple[int, ...] = ()
    """GPUs that it is meant for, as 10 * major + minor; empty: any."""
    max_batch: int = 8
    opt_batch: int = 1
    max_length: int = 2048
    """Tokens of each row in one prefill call; longer prompts are read in pieces."""
    opt_length: int = 512
    workspace_mb: int = 1024
    """Scratch memory that the builder may give to one layer."""
    optimization_level: int = 3
    """TensorRT's, 0 to 5: higher takes longer and may find faster kernels."""
    layout: str = "one"
    step_products: str = "plugin"
    """Who multiplies in a step plan of its own: "plugin" (see `plugin_products.py`), or "tensorrt"."""
    prefill_products: str = "tensorrt"
    """Likewise in a plan that reads prompts: that of prefill, or the one plan. "auto": the plugin, where it
    can and finds cuBLASLt, which multiplies many rows there."""
    step: str = PRODUCTS
    """Such a plan's step: layer by layer with these "products", all of it in "one-launch" of the plugin's
    (`one_launch.py`), or "auto": that where it fits."""

    def __post_init__(self) -> None:
        for name in ("max_batch", "opt_batch", "max_length", "opt_length", "workspace_mb"):
            _whole(self.name, name, getattr(self, name), 1, 1 << 30)
        _whole(self.name, "optimization_level", self.optimization_level, 0, 5)
        for small, large in (("opt_batch", "max_batch"), ("opt_length", "max_length")):
            if getattr(self, small) > getattr(self, large):
                raise UsageError(
                    f"{small} is larger than {large}",
                    got=f"{getattr(self, small)} > {getattr(self, large)} (recipe {self.name})",
                )
        if self.layout not in tuple(LAYOUTS):  # a tuple takes what cannot be hashed, too
            raise UsageError("unknown layout", got=repr(self.layout)[:80], expected=" or ".join(LAYOUTS))
        for name, known in (("step_products", MULTIPLIERS), ("prefill_products", (*MULTIPLIERS, AUTO))):
            if (value := getattr(self, name)) not in known:
                raise UsageError(f"unknown {name}", got=repr(value)[:80], expected=" or ".join(known))
        if self.step not in STEPS:
            raise UsageError("unknown step", got=repr(self.step)[:80], expected=" or ".join(STEPS))
        if self.step == ONE_LAUNCH and self.layout != "two":
            raise UsageError(
                "a step in one launch needs a plan of its own",
                got=f"layout {self.layout}",
                hint="--layout two",
            )
        if not self.precisions or any(p not in T_TYPES for p in self.precisions):
            raise UsageError(
                f"unknown precision in the recipe {self.name}",
                got=repr(list(self.precisions))[:80], expected=", ".join(T_TYPES),
            )  # fmt: skip
        for number in self.architectures:
            _whole(self.name, "a GPU in architectures", number, 10, 999)
        if not isinstance(self.description, str):
            raise UsageError(f"the description of the recipe {self.name} is not a text")

    @property
    def profiles(self) -> Profiles:
        """The sizes."""
        return Profiles(self.max_batch, self.max_length, self.opt_batch, self.opt_length)

    def with_changes(self, **changes: Any) -> Recipe:
        """The same recipe with some values replaced; None leaves one as it is. opt_* follow max_* down."""
        given = {name: value for name, value in changes.items() if value is not None}
        for small, large in (("opt_batch", "max_batch"), ("opt_length", "max_length")):
            if large in given and small not in given:
                given[small] = min(getattr(self, small), given[large])
        return replace(self, **given)


def recipe_names() -> list[str]:
    """Of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by name, or from a .toml file.

    Raises:
        UsageError: there is none, or it has a bad or unknown value.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not name.endswith(".toml") and name not in recipe_names():
        raise UsageError(
            f"there is no recipe {name!r}", expected=", ".join(recipe_names()),
            hint="or give the path of a .toml file",
        )  # fmt: skip
    data = read_bounded(path, LIMITS["recipe"], links=True, error=UsageError)
    values = parse_toml(data, f"the recipe {path}")
    known = {field.name for field in fields(Recipe)} - {"name"}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UsageError(
            f"the recipe {path} has unknown keys", got=", ".join(unknown), expected=", ".join(sorted(known))
        )
    for key in ("precisions", "architectures"):
        if key in values:
            if not isinstance(values[key], list):
                raise UsageError(f"{key} in the recipe {path} is not a list", got=repr(values[key])[:80])
            values[key] = tuple(values[key])
    return Recipe(name=path.stem, **values)


def _whole(recipe: str, name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise UsageError(
            f"{name} is out of range",
            got=f"{repr(value)[:80]} (recipe {recipe})",
            expected=f"a whole number, {least} to {most}",
        )
