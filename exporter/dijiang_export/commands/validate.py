"""`dijiang-export validate`: does a bundle or an engine compute on this machine what PyTorch recorded?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from dijiang_engines.validation.replay import REPLAYS
from dijiang_export.commands.arguments import PATH, RunnerArguments, takes
from dijiang_export.commands.common import DEFAULT_BUNDLE, Output

if TYPE_CHECKING:
    from dijiang_engines.validation.validate import Report


@dataclass(frozen=True)
class ValidateArguments:
    """What `validate` is given."""

    model: Annotated[Path, click.argument("model", metavar="[PATH]", type=PATH, default=DEFAULT_BUNDLE)]
    runner: RunnerArguments
    cases: Annotated[
        tuple[str, ...],
        click.option("--case", "cases", multiple=True, help="Only this recorded case; may be repeated."),
    ]
    replays: Annotated[
        tuple[str, ...],
        click.option(
            "--replay", "replays", multiple=True, type=click.Choice(list(REPLAYS)),
            help="Only this way of replaying; may be repeated.",
        ),
    ]  # fmt: skip
    report: Annotated[
        Path | None,
        click.option(
            "--report", metavar="FILE", type=PATH,
            help="Also write an HTML report that needs no network: tables, plots of the errors, failures.",
        ),
    ]  # fmt: skip
    force: Annotated[
        bool, click.option("--force", is_flag=True, help="Replace FILE even if it is not an earlier report.")
    ]


@click.command("validate", epilog="Example: dijiang-export validate ./pythia.bundle --report report.html")
@takes(ValidateArguments)
def validate(output: Output, given: ValidateArguments) -> None:
    """Replay the recorded cases of a bundle or an engine and compare logits and states with PyTorch's.

    Needs no PyTorch. Every case is run as a padded batch, in uneven pieces, token by token, row by row,
    with extra padding, and as a prefill continued in steps; 10,000 tokens, if recorded, in pieces and token
    by token. Exits with 1 if anything differs by more than the tolerance for the bundle's type. PATH is the
    folder of a bundle or an engine, by default ./tiny-stdlib.bundle.
    """
    report = _replay(given, output)
    output.print_result(report.to_json(), report.table)
    report.raise_on_mismatch()


def _replay(given: ValidateArguments, output: Output) -> Report:
    """Open, replay, compare; write the HTML report if one is wanted."""
    from dijiang_engines.formats.open import open_model
    from dijiang_engines.runners.base import RemembersValidation
    from dijiang_engines.validation.report import file as report_file
    from dijiang_engines.validation.report.facts import describe_run
    from dijiang_engines.validation.report.page import MARKER, report_html
    from dijiang_engines.validation.validate import validate as replay_and_compare

    if given.report is not None:
        report_file.check_target(given.report, MARKER, force=given.force)
    opened = open_model(given.model)
    reference = opened.reference()
    runner = given.runner.open(opened)
    report = replay_and_compare(
        runner,
        reference,
        dtype=opened.dtype,
        activations=opened.activations,
        cases=given.cases or None,
        replays=given.replays or None,
        progress=output.progress,
    )
    whole = not given.cases and not given.replays
    if report.passed and whole and isinstance(runner, RemembersValidation):
        runner.remember_validation()
    if given.report is not None:
        report_file.write_report(given.report, report_html(report, describe_run(opened, runner, reference)))
        output.log(f"report: {given.report}")
    return report
