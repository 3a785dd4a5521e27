"""`replay`: one failed attempt again, alone, in this process, from the file it was saved to."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from importlib import import_module
from typing import Any

import click
import msgspec

from stageflow.cli.loading import load_graph
from stageflow.cli.show import print_failures
from stageflow.context.folds import pairs
from stageflow.core.kinds import Lane, StageKind
from stageflow.pipeline.builder import PipelineBuilder
from stageflow.pipeline.graph import StageGraph
from stageflow.pipeline.spec import Role, StageSpec
from stageflow.report.failed import FailedFileError, FailedInput, FailedItem, load_failed
from stageflow.runtime.failing import FoldStep


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
    """A graph of that one stage, its dependencies replaced by the saved values, and the inputs of its run. Of a reduce,
    the step that failed is run: a block of elements, or accumulators that become one.

    What the stage raises is put into `seen`, with its frames.
    """
    wanted = list(spec.declared_deps)
    missing = [name for name in wanted if name not in given.values]
    if missing:
        listed = ", ".join(repr(name) for name in missing)
        raise FailedFileError(
            f"stage {spec.name!r} needs {listed}, which {failed.path} does not hold",
            hint="Only values that were still in memory when the stage failed are saved.",
            path=failed.path,
        )
    inputs = given.snapshot if isinstance(given.snapshot, dict) else getattr(given.snapshot, "inputs", None) or {}
    over = graph.specs[spec.over].name if spec.over >= 0 else spec.over_input
    renames: dict[str, str] = {}
    for binding in spec.bindings:
        if binding.source == "element" and spec.role != Role.REDUCE:
            renames[binding.param] = str(over)
        elif binding.source == "stage" and isinstance(binding.ref, int):
            renames[binding.param] = graph.specs[binding.ref].name
        elif binding.source == "input":
            renames[binding.param] = str(binding.ref)
    if spec.over_input is not None and spec.over_input in given.values:
        wanted.append(spec.over_input)
    builder = PipelineBuilder(f"replay of {graph.name}")
    step = given.values.get(str(over)) if spec.role == Role.REDUCE else None
    values = given.values if step is None else {**given.values, str(over): step.elements}
    if step is not None and step.job == "merge":
        assert spec.reduce is not None
        merge = _noting(spec.reduce.combine, seen) if spec.reduce.combine is not None else None
        return builder.stage(spec.name, functools.partial(_merged, merge, step.accumulators)).build(), dict(inputs)
    for name in dict.fromkeys(wanted):
        builder.stage(name, functools.partial(_given, values[name]), kind=StageKind.WORK)
    runner = _watched(spec.runner, seen)
    if step is None:
        builder.stage(spec.name, runner, wanted, kind=spec.kind, inputs=renames)
    else:
        after = [name for name in wanted if name != over]
        builder.reduce(
            spec.name, runner, str(over), after=after, kind=spec.kind, inputs=renames, **_initial(spec, step)
        )
    return builder.build(), dict(inputs)


def _initial(spec: StageSpec, step: FoldStep) -> dict[str, Any]:
    """What the fold of `step` began with, as keywords of a reduce: without any, its first element."""
    block = {"block": max(1, len(step.elements))}
    if step.accumulators:
        return {**block, "initial": step.accumulators[0]}
    return {**block, "initial": spec.reduce.initial} if spec.reduce is not None and spec.reduce.has_initial else block


async def _merged(merge: Any, accumulators: list[Any]) -> Any:
    """The accumulators as one, neighbours first, as the reduce does it; UNSET stands for an empty block."""
    level = accumulators
    while len(level) > 1:
        made = []
        for a, b in pairs(level):
            both = a if b is msgspec.UNSET else b if a is msgspec.UNSET else merge(a, b)
            made.append(await both if inspect.isawaitable(both) else both)
        level = made
    return level[0]


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
