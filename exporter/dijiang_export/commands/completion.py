"""`completion`: the shell's own completion script, made by click."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")


@click.command(epilog='Example, for this shell: eval "$(dijiang-export completion bash)"')
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that lets SHELL complete commands, options and paths."""
    from click.shell_completion import get_completion_class

    from dijiang_export.cli import COMPLETION_VARIABLE, PROGRAM, cli

    maker = get_completion_class(shell)
    assert maker is not None
    # source_vars and the template rather than source(): that one runs bash to ask its version.
    made = maker(cli, {}, PROGRAM, COMPLETION_VARIABLE)
    click.echo(made.source_template % made.source_vars())
