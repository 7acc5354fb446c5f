"""`dijiang-export validate`: does a bundle compute on this machine what PyTorch recorded?"""

from __future__ import annotations

from pathlib import Path

import click

from dijiang_engines.replay import REPLAYS
from dijiang_export.commands.common import DEFAULT_BUNDLE, Output, output_options


@click.command("validate", epilog="Example: dijiang-export validate ./pythia.bundle --replay steps")
@click.argument("bundle", type=click.Path(path_type=Path), default=DEFAULT_BUNDLE)
@click.option("--runner", default="auto", show_default=True, help="Which runtime; `doctor` lists them.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads; default: all cores.")
@click.option("--case", "cases", multiple=True, help="Only this recorded case; may be repeated.")
@click.option(
    "--replay",
    "replays",
    multiple=True,
    type=click.Choice(list(REPLAYS)),
    help="Only this way of replaying; may be repeated.",
)
@output_options
def validate(
    output: Output,
    bundle: Path,
    runner: str,
    threads: int | None,
    cases: tuple[str, ...],
    replays: tuple[str, ...],
) -> None:
    """Replay the recorded cases of BUNDLE and compare logits and states with PyTorch's.

    Needs no PyTorch. Every case is run as a padded batch, in uneven pieces, token by token, row by row,
    with extra padding, and as a prefill continued in steps. Exits with 1 if anything differs by more than
    the tolerance for the bundle's type. BUNDLE defaults to ./tiny-stdlib.bundle.
    """
    from dijiang_engines.bundle import open_bundle
    from dijiang_engines.runners.registry import open_runner
    from dijiang_engines.validate import validate as run

    opened = open_bundle(bundle)
    reference = opened.reference()
    report = run(
        open_runner(opened, runner, threads=threads),
        reference,
        dtype=opened.dtype,
        cases=cases or None,
        replays=replays or None,
        progress=output.progress,
    )
    output.print_result(report.to_json(), report.table)
    report.raise_on_mismatch()
