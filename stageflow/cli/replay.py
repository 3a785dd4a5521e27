"""`replay`: one failed attempt again, alone, in this process, from the file it was saved to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import click

from stageflow.cli.loading import load_graph
from stageflow.cli.show import print_failures
from stageflow.core.kinds import Lane, StageKind
from stageflow.pipeline.builder import PipelineBuilder
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.spec import Role, StageSpec
from stageflow.report.failed import FailedFileError, FailedInput, FailedItem, load_failed


@click.command(
    short_help="Run one failed attempt again, from its file.",
    epilog="""\b
Examples:
  stageflow run shop.py:graph --input day=friday --save-failed failed/
  stageflow replay failed/RUN/parse/17.sfail
  stageflow replay failed/RUN/parse/17.sfail --pdb
""",
)
@click.argument("file", metavar="FILE", type=click.Path())
@click.option("--target", metavar="MODULE:GRAPH", help="The graph, if the file does not say or it has moved.")
@click.option("--pdb", "debug", is_flag=True, help="Open the debugger where it fails.")
def replay(file: str, target: str | None, debug: bool) -> int:
    """Run the attempt that FILE describes, with the input it had, inline in this process.

    No retry, no timeout, no other stage. Exit code 0 if it succeeds now, 1 if it fails again. FILE is unpickled: only
    one that is yours, and that nobody else could have written, is accepted.
    """
    try:
        failed = load_failed(file)
        given = failed.load_input()
    except OSError as error:
        raise click.UsageError(f"{file!r} cannot be read: {error.strerror or error}") from error
    where = target or given.target or failed.target
    if where is None:
        raise click.UsageError(f"{file} does not say which graph it is from: give --target MODULE:GRAPH")
    graph = load_graph(where)
    spec = graph.stage_spec(failed.stage)
    item = f" item {'.'.join(map(str, failed.item))}" if failed.item else ""
    click.echo(f"stage {failed.stage!r}{item} failed with {failed.error_type}: {failed.error}", err=True)
    seen: list[BaseException] = []
    alone, inputs = isolate(graph, spec, given, failed, seen)
    result = alone.run(inputs, lane=str(Lane.INLINE), snapshot=None)
    if result.success:
        click.echo(f"it succeeds now: {result.data(spec.name)!r}")
        return 0
    print_failures(result, traceback=not debug)
    if debug and seen:
        import_module("pdb").post_mortem(seen[-1].__traceback__)
    return 1


def isolate(
    graph: StageGraph, spec: StageSpec, given: FailedInput, failed: FailedItem, seen: list[BaseException]
) -> tuple[StageGraph, dict[str, Any]]:
    """A graph of that one stage, its dependencies replaced by the saved values, and the inputs of its run.

    What the stage raises is put into `seen`, with its frames.
    """
    if spec.role == Role.REDUCE:
        raise FailedFileError(f"stage {spec.name!r} folds many items, and cannot be replayed", path=failed.path)
    wanted = list(spec.declared_deps)
    missing = [name for name in wanted if name not in given.values]
    if missing:
        listed = ", ".join(repr(name) for name in missing)
        raise FailedFileError(
            f"stage {spec.name!r} needs {listed}, which {failed.path} does not hold",
            hint="Only values that were still in memory when the stage failed are saved.",
            path=failed.path,
        )
    builder = PipelineBuilder(f"replay of {graph.name}")
    renames: dict[str, str] = {}
    for binding in spec.bindings:
        if binding.source == "element":
            renames[binding.param] = graph.specs[spec.over].name if spec.over >= 0 else str(spec.over_input)
        elif binding.source == "stage" and isinstance(binding.ref, int):
            renames[binding.param] = graph.specs[binding.ref].name
        elif binding.source == "input":
            renames[binding.param] = str(binding.ref)
    if spec.over_input is not None and spec.over_input in given.values:
        wanted.append(spec.over_input)
    for name in dict.fromkeys(wanted):
        builder.stage(name, functools.partial(_given, given.values[name]), kind=StageKind.WORK)
    builder.stage(spec.name, _watched(spec.runner, seen), wanted, kind=spec.kind, inputs=renames)
    inputs = given.snapshot if isinstance(given.snapshot, dict) else getattr(given.snapshot, "inputs", None) or {}
    return builder.build(), dict(inputs)


def _given(value: Any) -> Any:
    return value


def _watched(runner: Any, seen: list[BaseException]) -> Any:
    """`runner`, noting what it raises: an exception that has become data has no frames to look into."""
    made: Any = runner() if inspect.isclass(runner) and hasattr(runner, "execute") else runner
    if hasattr(made, "execute"):
        return _Watched(made, seen)
    return _noting(made, seen)


class _Watched:
    """An object stage that notes what it raises."""

    def __init__(self, stage: Any, seen: list[BaseException]) -> None:
        self.execute = _noting(stage.execute, seen)


def _noting(function: Callable[..., Any], seen: list[BaseException]) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def waited(*args: Any, **kwargs: Any) -> Any:
            try:
                return await function(*args, **kwargs)
            except BaseException as error:
                seen.append(error)
                raise

        return waited
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def given(*args: Any, **kwargs: Any) -> Any:
            try:
                yield from function(*args, **kwargs)
            except Exception as error:
                seen.append(error)
                raise

        return given
    if inspect.isasyncgenfunction(function):

        @functools.wraps(function)
        async def given_later(*args: Any, **kwargs: Any) -> Any:
            try:
                async for item in function(*args, **kwargs):
                    yield item
            except Exception as error:
                seen.append(error)
                raise

        return given_later

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            seen.append(error)
            raise

    return called
