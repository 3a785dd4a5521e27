"""The command group, and the one place where an error becomes a message and an exit code."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final, NamedTuple

import click

from stageflow.core.errors import DefinitionError, StageflowError
from stageflow.pipeline.names import did_you_mean

OK: Final = 0
FAILED: Final = 1
USAGE: Final = 2
INTERRUPTED: Final = 130
TERMINATED: Final = 143
_PIPE_CLOSED: Final = 141


class Entry(NamedTuple):
    """A command that is loaded when it is used. `extra` is what to install where its module is missing something."""

    target: str
    help: str
    extra: str | None = None


COMMANDS: Final = {
    "demo": Entry("stageflow.demo.command:demo", "Index Python's standard library on all lanes.", "web"),
    "run": Entry("stageflow.cli.run:run", "Run a graph and print what came out."),
    "plan": Entry("stageflow.cli.look:plan", "Print where each stage would run, and why."),
    "draw": Entry("stageflow.cli.look:draw", "Draw a graph: text, Mermaid, DOT or SVG."),
    "doctor": Entry("stageflow.cli.doctor:doctor", "Print what this machine offers, and what is in effect."),
    "replay": Entry("stageflow.cli.replay:replay", "Run one failed attempt again, from its file."),
    "web": Entry("stageflow.websearch.commands:web", "Fetch, extract and crawl pages.", "web"),
    "approvals": Entry("stageflow.tools.commands:approvals", "List and decide what waits for a person."),
    "completion": Entry("stageflow.cli.completion:completion", "Print the completion script of a shell."),
}


class Commands(click.Group):
    """A group whose commands are imported on use: `stageflow --help` loads none of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Load one; a missing extra is a message, not a traceback."""
        entry = COMMANDS.get(name)
        if entry is None:
            return None
        module, _, attribute = entry.target.partition(":")
        try:
            command: click.Command = getattr(import_module(module), attribute)
        except ModuleNotFoundError as error:
            missing = error.name or str(error)
            if missing.partition(".")[0] == "stageflow":
                raise click.ClickException(
                    f"this installation has no {name!r} command ({missing} is missing)"
                ) from error
            advice = f": pip install 'stageflow[{entry.extra}]'" if entry.extra else ""
            raise click.ClickException(
                f"{name!r} needs the package {missing!r}, which is not installed{advice}"
            ) from error
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with the nearest names when there is no such command."""
        name = args[0]
        if name not in COMMANDS and not name.startswith("-") and not ctx.resilient_parsing:
            raise click.UsageError(
                f"there is no command {name!r}. {did_you_mean(name, COMMANDS, what='Commands')}", ctx
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table itself, so that help imports nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog="Exit codes: 0 success, 1 a stage failed, 2 a mistake in the call, 130 interrupted.",
)
@click.version_option(package_name="stageflow", prog_name="stageflow")
def cli() -> None:
    """Run pipelines of Python functions on every core of this machine.

    \b
    stageflow demo                                   a real job, to see it work
    stageflow run shop.py:graph --input day=friday   your own graph
    stageflow plan shop.py:graph                     where each stage would run, and why
    """


def invoke(args: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code and never raises for what the user did."""
    try:
        code = cli.main(list(args) if args is not None else None, prog_name="stageflow", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.Abort:
        return INTERRUPTED
    except click.ClickException as error:
        complain(_usage_text(error))
        return USAGE
    except KeyboardInterrupt:
        complain("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        _drop_stdout()
        return _PIPE_CLOSED
    except DefinitionError as error:
        complain(str(error))
        return USAGE
    except StageflowError as error:
        complain(f"{error}\n  [{error.code}]")
        return FAILED
    return code if isinstance(code, int) else OK


def complain(message: str) -> None:
    """One message on standard error, under our name."""
    try:
        click.echo(f"stageflow: {message}", err=True)
    except BrokenPipeError:
        pass


def main() -> None:
    """The console script."""
    # A run makes many short-lived objects and hardly a cycle: at the interpreter's own threshold of 700, looking for
    # cycles takes a tenth of this process's time. It is our process; a library leaves this alone.
    gc.set_threshold(20_000, 20, 20)
    sys.exit(invoke())


def _usage_text(error: click.ClickException) -> str:
    message = error.format_message()
    context: Any = getattr(error, "ctx", None)
    if context is None or not isinstance(error, click.UsageError):
        return message
    path = context.command_path.removeprefix("stageflow").strip()
    where = f"{path}: " if path else ""
    return f"{where}{message[:1].lower()}{message[1:]}\n  -> {context.command_path} --help says what there is."


def _drop_stdout() -> None:
    # The reader went away (`| head`); without this the interpreter complains once more when it flushes at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
