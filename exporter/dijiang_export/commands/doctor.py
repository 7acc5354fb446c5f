"""`dijiang-export doctor`: what works here."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from dijiang_export.commands.common import Output, output_options

if TYPE_CHECKING:
    from rich.console import Group
    from rich.text import Text

    from dijiang_engines.doctor import Diagnosis
    from dijiang_engines.machine import Machine
    from dijiang_engines.plugin.status import PluginStatus


@click.command("doctor", epilog="Example: dijiang-export doctor --json")
@output_options
def doctor(output: Output) -> None:
    """Say which runners work on this machine, what is missing, and how to get it.

    Each installed runtime is tried on a one-node model in a process of its own. Exits with 1 if none works.
    """
    from dijiang_engines.doctor import diagnose
    from dijiang_engines.errors import RunnerError

    found = diagnose()
    output.print_result(found.to_json(), lambda: draw(found))
    if not found.works:
        hints = [runner.hint for runner in found.runners if runner.hint]
        raise RunnerError("no runner works on this machine", hint=hints[0] if hints else None)


def draw(found: Diagnosis) -> Group:
    """For people: what `to_json` holds."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    machine = Table.grid(padding=(0, 2))
    for name, value in _machine_rows(found.version, found.machine):
        machine.add_row(name, Text(value))
    runners = Table(title="Runners", title_justify="left")
    for column in ("runner", "works", "version", "", "to get it"):
        runners.add_column(column)
    for runner in found.runners:
        runners.add_row(
            runner.name,
            _mark(runner.works),
            runner.version or "-",
            Text(runner.detail),
            Text(runner.hint or ""),
        )
    parts: list[Table | Text | Group] = [machine, runners]
    for ability in found.abilities:
        table = Table(title=f"To {ability.name}", title_justify="left")
        for column in ("needs", "", "version", "at least", "to get it"):
            table.add_column(column)
        for need in ability.needs:
            cells = (
                need.name,
                _mark(need.enough),
                need.version or "-",
                need.least or "",
                Text(need.hint or ""),
            )
            table.add_row(*cells)
        parts.append(table)
    parts.append(_plugin(found.plugin))
    parts.append(_runtimes(found))
    for problem in found.problems:
        parts.append(
            Text.assemble(("problem: ", "red"), problem.what, "\n", ("hint: ", "bold"), problem.hint)
        )
    return Group(*parts)


def _runtimes(found: Diagnosis) -> Group:
    """TensorRT and TensorRT for RTX, the engines here, and what is missing."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Runtimes of engines", title_justify="left")
    for column in ("runtime", "version", "runs here", "builds here", "", "to get it"):
        table.add_column(column)
    for runtime in found.runtimes:
        table.add_row(
            runtime.title,
            runtime.version or "-",
            _mark(runtime.runs),
            _mark(runtime.builds),
            Text(runtime.detail),
            Text(runtime.hint or ""),
        )
    parts: list[Table | Text] = [table]
    if found.engines:
        engines = Table(title="Engines in this folder", title_justify="left")
        for column in ("engine", "fits", "made for", "", "next"):
            engines.add_column(column)
        for engine in found.engines:
            about, detail, hint = Text(engine.made_for), Text(engine.detail), Text(engine.hint or "")
            engines.add_row(Text(engine.folder), _mark(engine.fits), about, detail, hint)
        parts.append(engines)
    if found.missing:
        parts.append(Text.assemble(("missing for an engine: ", "bold"), found.missing))
    return Group(*parts)


def _plugin(plugin: PluginStatus) -> Group:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = Text("Kernels and TensorRT plugin", style="italic")
    facts = Table.grid(padding=(0, 2))
    if plugin.known_architectures:
        known = " ".join(str(number) for number in plugin.known_architectures)
        facts.add_row("compiler", Text(f"{plugin.nvcc}, for the architectures {known}"))
    if plugin.gpu_architectures:
        facts.add_row("GPUs", " ".join(str(number) for number in plugin.gpu_architectures))
    for version, folder in plugin.headers:
        facts.add_row("headers", Text(f"TensorRT {version} in {folder}"))
    if plugin.hint:
        facts.add_row("next", Text(plugin.hint))
    if not plugin.built:
        facts.add_row("built", "nothing yet")
        return Group(title, facts)
    table = Table(title="Built", title_justify="left")
    for column in ("state", "TensorRT", "for", "CUDA", "where"):
        table.add_column(column)
    for built in plugin.built:
        style = {"current": "green", "foreign": ""}.get(built.state, "red")
        state = Text(built.state, style=style)
        names = Text(" ".join((*built.architectures, f"on {built.machine}")))
        table.add_row(state, built.tensorrt or "-", names, built.cuda, Text(built.folder))
    return Group(title, facts, table)


def _mark(works: bool) -> Text:
    from rich.text import Text

    return Text("yes", style="green") if works else Text("no", style="red")


def _machine_rows(version: str, machine: Machine) -> list[tuple[str, str]]:
    def gib(size: int | None) -> str:
        return "?" if size is None else f"{size / 2**30:.1f} GiB"

    features = f" ({', '.join(machine.cpu_features)})" if machine.cpu_features else ""
    rows = [
        ("dijiang-export", f"{version}, Python {machine.python}"),
        ("system", f"{machine.system}, {machine.architecture}"),
        ("CPU", f"{machine.cpu}{features}, {machine.usable_cpus} of {machine.logical_cpus} usable"),
        ("memory", f"{gib(machine.memory_bytes)}, {gib(machine.available_bytes)} available"),
    ]
    if machine.board:
        rows.append(("board", machine.board))
    for gpu in machine.gpus:
        about = (
            f"{gib(gpu.memory_bytes)}, compute {gpu.compute_capability or '?'}, driver {gpu.driver or '?'}"
        )
        rows.append(("GPU", f"{gpu.name}, {about}"))
    if not machine.gpus:
        rows.append(("GPU", "none found"))
    return rows
