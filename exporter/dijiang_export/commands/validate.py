"""`dijiang-export validate`: does a bundle or an engine compute on this machine what PyTorch recorded?"""

from __future__ import annotations

from pathlib import Path

import click

from dijiang_engines.validation.replay import REPLAYS
from dijiang_export.commands.common import DEFAULT_BUNDLE, Output, output_options, runner_options


@click.command("validate", epilog="Example: dijiang-export validate ./pythia.bundle --report report.html")
@click.argument("model", metavar="[PATH]", type=click.Path(path_type=Path), default=DEFAULT_BUNDLE)
@runner_options
@click.option("--case", "cases", multiple=True, help="Only this recorded case; may be repeated.")
@click.option(
    "--replay",
    "replays",
    multiple=True,
    type=click.Choice(list(REPLAYS)),
    help="Only this way of replaying; may be repeated.",
)
@click.option(
    "--report",
    "report_path",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Also write an HTML report that needs no network: tables, plots of the errors, failures.",
)
@click.option("--force", is_flag=True, help="Replace FILE even if it is not an earlier report.")
@output_options
def validate(
    output: Output,
    model: Path,
    runner: str,
    threads: int | None,
    spinning: str | None,
    prepack: str | None,
    cases: tuple[str, ...],
    replays: tuple[str, ...],
    report_path: Path | None,
    force: bool,
) -> None:
    """Replay the recorded cases of a bundle or an engine and compare logits and states with PyTorch's.

    Needs no PyTorch. Every case is run as a padded batch, in uneven pieces, token by token, row by row,
    with extra padding, and as a prefill continued in steps; 10,000 tokens, if recorded, in pieces and token
    by token. Exits with 1 if anything differs by more than the tolerance for the bundle's type. PATH is the
    folder of a bundle or an engine, by default ./tiny-stdlib.bundle.
    """
    from dijiang_engines.formats.open import open_model
    from dijiang_engines.runners.registry import open_runner
    from dijiang_engines.validation.report import file as report_file
    from dijiang_engines.validation.report.facts import describe_run
    from dijiang_engines.validation.report.page import MARKER, report_html
    from dijiang_engines.validation.validate import validate as run

    if report_path is not None:
        report_file.check_target(report_path, MARKER, force=force)
    opened = open_model(model)
    reference = opened.reference()
    runs = open_runner(opened, runner, threads=threads, spinning=spinning, prepack=prepack)
    report = run(
        runs,
        reference,
        dtype=opened.dtype,
        cases=cases or None,
        replays=replays or None,
        progress=output.progress,
    )
    if report_path is not None:
        report_file.write_report(report_path, report_html(report, describe_run(opened, runs, reference)))
        output.log(f"report: {report_path}")
    output.print_result(report.to_json(), report.table)
    report.raise_on_mismatch()
