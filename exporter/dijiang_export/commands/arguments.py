"""What a command is given, as frozen dataclasses: click fills them, mypy sees them.

A field is written with its type, and with the click option or argument that it is read from. A field may also
be another such dataclass, whose parameters then stand at its place: so commands share groups of options.

    @dataclass(frozen=True)
    class DescribeArguments:
        model: Annotated[Path, click.argument("model", type=PATH)]
        runner: RunnerArguments

    @click.command("describe")
    @takes(DescribeArguments)
    def describe(output: Output, given: DescribeArguments) -> None:
        ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeGuard, TypeVar, get_args, get_type_hints

import click

from dijiang_export.commands.common import DEFAULT_BUNDLE, Output, current_output, declare_output_options

if TYPE_CHECKING:
    from dijiang_engines.formats.open import Model
    from dijiang_engines.runners.base import Runner

T = TypeVar("T")

Dtype = Literal["float32", "float16", "bfloat16"]
Cases = Literal["none", "short", "full"]
Spinning = Literal["auto", "on", "off"]
Prepack = Literal["auto", "none", "step", "all", "wide"]
PATH = click.Path(path_type=Path)
"""A file or a folder, which need not exist."""
FILE = click.Path(dir_okay=False, path_type=Path)
COUNT = click.IntRange(min=1)


def one_of(literal: object) -> click.Choice[str]:
    """The values of a `Literal` as click's choices."""
    return click.Choice(get_args(literal))


def takes(arguments: type[T]) -> Callable[[Callable[[Output, T], None]], Callable[..., None]]:
    """Give a command the parameters of a dataclass, and `-q/--quiet` and `--json`.

    The function is called with the invocation's `Output` and with a `T` of what was given.

    Raises:
        TypeError: a field has no parameter, or more than one.
    """
    declared = _parameters(arguments)

    def decorate(function: Callable[[Output, T], None]) -> Callable[..., None]:
        @wraps(function)
        def command(**values: object) -> None:
            function(current_output(click.get_current_context()), _filled(arguments, values))

        declare_output_options(command)
        for declare in reversed(declared):
            declare(command)
        return command

    return decorate


def _parameters(arguments: type) -> list[Callable[[Callable[..., None]], object]]:
    """What click.option and click.argument returned for the fields, in their order."""
    found = []
    for name, hint in fields_of(arguments).items():
        if _is_group(hint):
            found += _parameters(hint)
            continue
        declared = [mark for mark in getattr(hint, "__metadata__", ()) if callable(mark)]
        if len(declared) != 1:
            raise TypeError(f"{arguments.__name__}.{name} is annotated with {len(declared)} parameters")
        found += declared
    return found


def _filled(arguments: type[T], values: Mapping[str, object]) -> T:
    made = {
        name: _filled(hint, values) if _is_group(hint) else values[name]
        for name, hint in fields_of(arguments).items()
    }
    return arguments(**made)


def _is_group(hint: object) -> TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def fields_of(arguments: type) -> dict[str, Any]:
    """The fields' types by name, in order, as they are annotated."""
    hints = get_type_hints(arguments, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(arguments)}


# -- what several commands take -----------------------------------------------------------------------


def _writable(_ctx: click.Context, _parameter: click.Parameter, value: Path | None) -> Path | None:
    """Find out before minutes of measuring that the result cannot be kept."""
    if value is not None:
        from dijiang_engines.formats.atomic_file import check_output_file

        check_output_file(value)
    return value


BundleOrDefault = Annotated[Path, click.argument("bundle", type=PATH, default=DEFAULT_BUNDLE)]

Save = Annotated[
    Path | None,
    click.option("--save", type=PATH, callback=_writable, help="Also write the result as JSON to a file."),
]

KernelLibrary = Annotated[
    Path | None, click.option("--library", type=FILE, help="Our kernels; default: the built ones.")
]
KernelSeconds = Annotated[
    float,
    click.option(
        "--seconds", type=click.FloatRange(min=0.001), default=0.2, show_default=True,
        help="Measure each figure for about this long.",
    ),
]  # fmt: skip

NoVerify = Annotated[
    bool,
    click.option(
        "--no-verify", is_flag=True, help="Do not hash the weights first (large models start sooner)."
    ),
]


@dataclasses.dataclass(frozen=True)
class RunnerArguments:
    """`--runner` and what the runners can be told, as for `open_runner`.

    None stands for a runner's own default, so that only what was given is given to it: an option that the
    chosen runner does not know is refused.
    """

    runner: Annotated[
        str,
        click.option(
            "--runner", default="auto", show_default=True, help="Which runtime; `doctor` lists them."
        ),
    ]
    threads: Annotated[
        int | None,
        click.option(
            "--threads", type=COUNT, help="ONNX Runtime, OpenVINO: CPU threads. [default: all cores]"
        ),
    ]
    spinning: Annotated[
        Spinning | None,
        click.option(
            "--spinning",
            type=one_of(Spinning),
            help="ONNX Runtime: do threads wait busily for work? `off` is for cores that others use too; "
            "`auto` is ONNX Runtime's own way, on. [default: DIJIANG_SPINNING, or auto]",
        ),
    ]
    prepack: Annotated[
        Prepack | None,
        click.option(
            "--prepack",
            type=one_of(Prepack),
            help="ONNX Runtime: which graphs get their own faster copy of the weights. `none` needs the "
            "least memory; `auto` is `step`, or of quantised weights `all`, if there is room; `wide` is "
            "`all`, and prompts are read with quantised weights made float32: fast, in 8 bytes a weight. "
            "[default: auto]",
        ),
    ]

    def open(self, model: Model) -> Runner:
        """The runner of a bundle or an engine; raises as `open_runner`."""
        from dijiang_engines.runners.registry import open_runner

        return open_runner(
            model, self.runner, threads=self.threads, spinning=self.spinning, prepack=self.prepack
        )
