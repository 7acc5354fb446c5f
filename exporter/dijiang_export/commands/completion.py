"""`completion`: the shell's own completion script, made by click."""

from __future__ import annotations

import click

from dijiang_export.commands.common import COMPLETION_VARIABLE, PROGRAM

SHELLS = ("bash", "zsh", "fish")


@click.command(epilog='Example, for this shell: eval "$(dijiang-export completion bash)"')
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that lets SHELL complete commands, options and paths."""
    from click.shell_completion import get_completion_class

    maker = get_completion_class(shell)
    assert maker is not None
    # source_vars and the template rather than source(): that one runs bash to ask its version.
    made = maker(ctx.find_root().command, {}, PROGRAM, COMPLETION_VARIABLE)
    click.echo(made.source_template % made.source_vars())
