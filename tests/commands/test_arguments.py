"""What a command is given: the types that mypy sees are those of what click delivers, for every command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import click
import pytest
from click.testing import CliRunner

from dijiang_export.cli import COMMANDS, cli
from dijiang_export.commands.arguments import RunnerArguments, fields_of, one_of, takes
from dijiang_export.commands.common import Output

TAKE_NOTHING = ("completion", "doctor")
"""completion has no results that --json could show; doctor has no options of its own."""
NAMED_BY_DATA = {"replays": tuple[str, ...]}
"""Fields whose choices are the keys of a table elsewhere, which no type can list."""
SIMPLE = {
    click.types.IntParamType: int,
    click.types.IntRange: int,
    click.types.FloatParamType: float,
    click.types.FloatRange: float,
    click.types.StringParamType: str,
    click.types.BoolParamType: bool,
}


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from leaves(command, (*path, name))
        else:
            yield " ".join((*path, name)), command


EVERY = dict(leaves(cli))


def delivered(parameter: click.Parameter) -> Any:
    """The type of the values that click gives for a parameter."""
    kind = parameter.type
    if isinstance(kind, click.Choice):
        one: Any = Literal[tuple(kind.choices)]
    elif isinstance(kind, click.Path):
        one = kind.type or str
    else:
        one = SIMPLE[type(kind)]
    if parameter.multiple or parameter.nargs == -1:
        return tuple[one, ...]
    absent = parameter.to_info_dict()["default"] is None and not parameter.required
    flag = getattr(parameter, "is_flag", False)
    return Union[one, None] if absent and not flag else one  # noqa: UP007 - of types known when it runs


def same(first: Any, second: Any) -> bool:
    """Equal types; `X | None` and `Optional[X]` are."""
    unions = (Union, UnionType)
    if get_origin(first) in unions and get_origin(second) in unions:
        return set(get_args(first)) == set(get_args(second))
    return bool(first == second)


def flat(arguments: type) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, hint in fields_of(arguments).items():
        if get_origin(hint) is Annotated:
            assert name not in found
            found[name] = get_args(hint)[0]
        else:
            inner = flat(hint)
            assert not set(inner) & set(found)
            found |= inner
    return found


def test_the_commands_are_found() -> None:
    assert {name.split()[0] for name in EVERY} == set(COMMANDS)
    assert len(EVERY) >= 14


@pytest.mark.parametrize("name", [name for name in EVERY if name not in TAKE_NOTHING])
def test_fields_have_the_types_that_click_delivers(name: str) -> None:
    callback = EVERY[name].callback
    hints = get_type_hints(callback.__wrapped__)  # type: ignore[union-attr]
    assert hints.keys() == {"output", "given", "return"} and hints["output"] is Output
    parameters = {p.name: p for p in EVERY[name].params if p.expose_value}
    declared = flat(hints["given"])
    assert list(declared) == list(parameters)
    wrong = {
        field: (hint, delivered(parameters[field]))
        for field, hint in declared.items()
        if not same(hint, NAMED_BY_DATA.get(field, delivered(parameters[field])))
    }
    assert wrong == {}


def test_a_wrong_type_would_be_noticed() -> None:
    parameter = click.Option(["--save"], type=click.Path(path_type=Path))
    assert same(delivered(parameter), Path | None)
    for other in (str | None, Path, tuple[Path, ...], Literal["a"] | None, Any):
        assert not same(delivered(parameter), other)


@dataclass(frozen=True)
class Given:
    size: Annotated[int, click.option("--size", type=int, default=3)]
    runner: RunnerArguments
    kind: Annotated[Literal["a", "b"] | None, click.option("--kind", type=one_of(Literal["a", "b"]))]
    names: Annotated[tuple[str, ...], click.argument("names", nargs=-1)]


@click.command("show")
@takes(Given)
def show(output: Output, given: Given) -> None:
    """Show what is given."""
    output.print_result([asdict(given), output.json, output.quiet])


def shown(*words: str) -> Any:
    result = CliRunner().invoke(show, words, catch_exceptions=False)
    return json.loads(result.stdout) if result.exit_code == 0 else result.exit_code


def test_a_command_is_called_with_what_was_given() -> None:
    nothing = {"runner": "auto", "threads": None, "spinning": None, "prepack": None}
    assert shown() == [{"size": 3, "runner": nothing, "kind": None, "names": []}, False, False]
    words = ("x", "--kind", "b", "--size", "7", "--threads", "2", "--spinning", "off", "y", "--json", "-q")
    told = nothing | {"threads": 2, "spinning": "off"}
    assert shown(*words) == [{"size": 7, "runner": told, "kind": "b", "names": ["x", "y"]}, True, True]
    assert shown("--kind", "c") == shown("--threads", "0") == 2


def test_options_are_listed_in_the_order_of_the_fields_and_output_last() -> None:
    options = [opt for p in show.params for opt in p.opts if opt.startswith("--")]
    runner = ["--runner", "--threads", "--spinning", "--prepack"]
    assert options == ["--size", *runner, "--kind", "--quiet", "--json"]


def test_a_field_without_a_parameter_is_a_defect() -> None:
    @dataclass(frozen=True)
    class Bare:
        size: int

    with pytest.raises(TypeError, match=r"Bare\.size"):
        takes(Bare)
