"""`stageflow completion SHELL`: what to source so that the shell completes commands, options and files."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command(
    short_help="Print the completion script of a shell.",
    epilog="""\b
Examples:
  eval "$(stageflow completion bash)"                              in ~/.bashrc
  eval "$(stageflow completion zsh)"                               in ~/.zshrc
  stageflow completion fish > ~/.config/fish/completions/stageflow.fish
""",
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that teaches SHELL to complete `stageflow`."""
    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"click knows no completion for {shell}", ctx)
    root = ctx.find_root().command
    click.echo(kind(root, {}, "stageflow", "_STAGEFLOW_COMPLETE").source())
