"""`stageflow demo`: runs the pipeline of `pipeline.py` and tells where the time went."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree
from typing import Any, Final, NamedTuple

import click
import msgspec

from stageflow import Engine
from stageflow.demo import service
from stageflow.demo.index import FILES, Searcher
from stageflow.demo.pipeline import Summary, graph
from stageflow.report.failed import FailedInput
from stageflow.report.terminal import CpuMeter, CpuSplit, console, jsonable, seconds, size, stage_table
from stageflow.report.views import Views, view_options

_MAX_SKIPPED: Final = 12
_MAX_HITS: Final = 10
_SERVICE_START: Final = 10.0  # seconds; a cold interpreter on a loaded machine


class Done(NamedTuple):
    """One run of the demo."""

    result: Any
    cpu: CpuSplit
    wall: float
    interrupted: int  #: exit code of the signal that stopped it, or 0

    @property
    def summary(self) -> Summary | None:
        """What the report stage returned; None if the run did not get there."""
        return self.result.data("report") if self.result.success else None


@click.command(
    short_help="Index Python's standard library on all lanes.",
    epilog="""\b
Examples:
  stageflow demo                                    the standard library of this Python
  stageflow demo --compare                          and once more with one worker
  stageflow demo --root ~/src --output ~/src-index  any other tree
  stageflow demo --query "async generator*"         search what was indexed
  stageflow demo --report run.html --ui             with any view that `stageflow run` has
""",
)
@click.option("--root", metavar="PATH", help="The tree to index. Default: the standard library.")
@click.option(
    "--output", "-o", metavar="DIR", default="stageflow-demo", show_default=True, help="Where the index goes."
)
@click.option("--processes", "-p", type=click.IntRange(min=1), help="Workers. Default: one per usable core.")
@click.option("--compare", is_flag=True, help="Do the same job with one worker, and print the speed-up.")
@click.option(
    "--query", "-q", metavar="WORDS", help="Search the index (made first if there is none). name* is a prefix."
)
@view_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead.")
def demo(
    root: str | None,
    output: str,
    processes: int | None,
    compare: bool,
    query: str | None,
    as_json: bool,
    **views: Any,
) -> int:
    """Index a tree of Python source: a real job through async, thread and process stages.

    Writes a searchable index and one HTML page, then says what each stage did and where the time went. The pipeline is
    stageflow/demo/pipeline.py: it is short, and a good first example.
    """
    tree, folder = _readable(root), _writable(output)
    asked = compare or any(value is not None and value is not False for value in views.values())
    if query is not None and (folder / FILES[0]).is_file() and root is None and not asked:
        return _search(folder, query, as_json=as_json)
    with _service() as (address, pid):
        inputs = {"root": str(tree), "output": str(folder), "service": address}
        done = _run(inputs, processes, views, pid)
        single = None
        if compare and done.result.success:
            beside = folder / ".one-worker"
            single = _run({**inputs, "output": str(beside)}, 1, {"progress": views["progress"]}, pid)
    if as_json:
        _print_json(done, single)
    else:
        _print(done, folder)
        if single is not None:
            _print_comparison(done, single, folder)
    if single is not None:
        rmtree(folder / ".one-worker", ignore_errors=True)
    if done.interrupted or (single is not None and single.interrupted):
        return done.interrupted or (single.interrupted if single else 0)
    if not done.result.success:
        return 1
    return _search(folder, query, as_json=False) if query is not None and not as_json else 0


def _run(inputs: dict[str, str], processes: int | None, views: dict[str, Any], service_pid: int) -> Done:
    """One run on an engine of its own, measured from the first pull to the last byte written."""
    options: dict[str, Any] = {} if processes is None else {"processes": processes}
    given = FailedInput(snapshot=inputs, target="stageflow.demo.pipeline:graph")
    with Views.from_options(graph, dict(views), given) as shown, Engine(**options) as engine:
        meter = CpuMeter(without=[service_pid])
        began = time.perf_counter()
        interrupted = 0
        try:
            result = graph.run(inputs, engine=engine, event_sinks=shown.sinks)
        except (KeyboardInterrupt, SystemExit) as stop:  # the second comes from SIGTERM, with its exit code
            result = getattr(stop, "result", None)
            if result is None:
                raise
            interrupted = int(stop.code or 1) if isinstance(stop, SystemExit) else 130
        wall = time.perf_counter() - began
        done = Done(result, meter.split(result.stats), wall, interrupted)
        shown.finish()
        return done


def _readable(root: str | None) -> Path:
    tree = Path(root or sysconfig.get_paths()["stdlib"]).expanduser().resolve()
    if not tree.exists():
        raise click.UsageError(f"--root {root!r}: there is no such folder")
    if not tree.is_dir():
        raise click.UsageError(f"--root {root!r} is a file; name the folder it is in")
    if not os.access(tree, os.R_OK | os.X_OK):
        raise click.UsageError(f"--root {root!r} cannot be read: check its permissions")
    return tree


def _writable(output: str) -> Path:
    folder = Path(output).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.UsageError(f"--output {output!r} cannot be made: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise click.UsageError(f"--output {output!r} cannot be written to: choose another folder")
    return folder


@contextmanager
def _service() -> Iterator[tuple[str, int]]:
    """The package service in a process of its own, for as long as the demo runs."""
    if find_spec("httpx") is None:
        click.echo("httpx is not installed, so stage 'packages' is skipped: pip install 'stageflow[web]'", err=True)
    else:
        # Imports of 0.1 s belong to starting: on the loop they would hold up every lane. httpx puts its own off.
        import anyio  # noqa: F401
        import httpcore  # noqa: F401
        import httpx  # noqa: F401
    process = subprocess.Popen(
        [sys.executable, "-P", service.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is ours to handle; it ends when its standard input does
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        address = process.stdout.readline().decode().strip()
        if not address:
            raise click.ClickException("the demo's package service did not start")
        yield address, process.pid
    finally:
        process.stdin.close()
        process.stdout.close()
        try:
            process.wait(_SERVICE_START)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _print(done: Done, folder: Path) -> None:
    out = console(sys.stdout)
    result, summary = done.result, done.summary
    if done.interrupted:
        out.print(f"stopped after {seconds(done.wall)}; what was done until then:")
    elif summary is not None:
        out.print(
            f"{summary.indexed:,} of {summary.files:,} files, {summary.lines:,} lines, {summary.functions:,} functions,"
            f" {summary.classes:,} classes, {summary.words:,} words"
        )
        for path, reason in list(summary.skipped.items())[:_MAX_SKIPPED]:
            # Whole in a pipe; on a terminal a line each.
            line = f"  skipped {path}: {reason}"
            if out.is_terminal:
                out.print(line, no_wrap=True, overflow="ellipsis")
            else:
                out.print(line, soft_wrap=True)
        if len(summary.skipped) > _MAX_SKIPPED:
            out.print(f"  ... and {len(summary.skipped) - _MAX_SKIPPED} more (report.html lists them)")
    out.print(stage_table(result.stats, graph.index, out.width))
    for name, output in result.outputs.items():
        if output.error is not None:
            console(sys.stderr).print(f"failed: stage {name!r}: {output.error}", style="red", soft_wrap=True)
        elif output.skip_reason is not None and not done.interrupted:
            out.print(f"stage {name!r} was skipped: {output.skip_reason}", soft_wrap=True)
    cores = done.cpu.total / done.wall if done.wall > 0 else 0.0
    out.print(
        f"{seconds(done.wall)} wall, {seconds(done.cpu.total)} CPU ({cores:.1f} cores busy),"
        f" of which the parent used {done.cpu.parent_share:.1%}"
    )
    if summary is not None:
        out.print(f"index  {_shown(folder)} ({size(sum(summary.nbytes.values()))})", soft_wrap=True)
        out.print(f"page   {_shown(folder / 'report.html')}", soft_wrap=True)
        out.print('search stageflow demo --query "async generator*"')


def _print_comparison(done: Done, single: Done, folder: Path) -> None:
    out = console(sys.stdout)
    if not single.result.success:
        out.print("the run with one worker did not end well; there is nothing to compare")
        return
    same = all((folder / name).read_bytes() == (folder / ".one-worker" / name).read_bytes() for name in FILES)
    out.print(
        f"\nwith one worker {seconds(single.wall)}: {single.wall / done.wall:.2f} times as long;"
        f" the index is {'the same, byte for byte' if same else 'DIFFERENT'}"
    )


def _print_json(done: Done, single: Done | None) -> None:
    shown = {
        "success": done.result.success,
        "status": str(done.result.status),
        "wall_seconds": done.wall,
        "cpu_seconds": {"parent": done.cpu.parent, "workers": done.cpu.workers},
        "parent_share": done.cpu.parent_share,
        "summary": done.summary,
        "stages": {name: row.to_dict() for name, row in done.result.stats.items()},
        "one_worker_seconds": single.wall if single else None,
    }
    click.echo(msgspec.json.encode(jsonable(shown)))


def _search(folder: Path, query: str, *, as_json: bool) -> int:
    """Print the modules that hold every word of `query`."""
    try:
        searcher = Searcher(folder)
    except (OSError, ValueError) as error:
        raise click.UsageError(
            f"the index in {_shown(folder)} is damaged ({error}): run `stageflow demo` again"
        ) from error
    words = query.split()
    hits = searcher.search(words)
    if as_json:
        click.echo(msgspec.json.encode(hits))
        return 0
    out = console(sys.stdout)
    where = f"{len(searcher.catalogue.modules):,} modules of {searcher.catalogue.root}"
    out.print(f"{len(hits):,} of {where} hold {' and '.join(words)}", soft_wrap=True)
    for hit in hits[:_MAX_HITS]:
        lines = ", ".join(map(str, hit.lines[:8])) + (", ..." if len(hit.lines) > 8 else "")
        out.print(f"  {hit.path}: {hit.count} on lines {lines}", soft_wrap=True)
        if text := _quote(Path(searcher.catalogue.root, hit.path), hit.best):
            out.print(f"      {hit.best}: {text}", style="dim", soft_wrap=True)
    if len(hits) > _MAX_HITS:
        out.print(f"  ... and {len(hits) - _MAX_HITS} more (--json lists them)")
    return 0


def _quote(path: Path, line: int) -> str:
    """That line of a file, if both are still there."""
    try:
        return path.read_text("utf-8", "replace").split("\n")[line - 1].strip()[:100]
    except (OSError, IndexError):
        return ""


def _shown(path: Path) -> str:
    """Relative where that is shorter."""
    relative = os.path.relpath(path)
    return relative if len(relative) < len(str(path)) else str(path)
