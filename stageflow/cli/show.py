"""A result, for people and for programs."""

from __future__ import annotations

import signal
import sys
from typing import Any, Final

import msgspec

from stageflow.core.failure import revive
from stageflow.core.kinds import StageStatus
from stageflow.core.output import ErrorInfo
from stageflow.pipeline.graph import StageGraph
from stageflow.report.terminal import CpuSplit, console, jsonable, seconds, stage_table
from stageflow.runtime.result import FailureRecord, RunResult

#: failures and outputs beyond these are counted, not listed
_MAX_FAILURES: Final = 10
_MAX_OUTPUT: Final = 400


def stopped(interrupt: BaseException) -> tuple[Any, int]:
    """What a stopped run had done (None if it had not begun), and the exit code of the signal that stopped it."""
    code = interrupt.code if isinstance(interrupt, SystemExit) else 128 + signal.SIGINT
    return getattr(interrupt, "result", None), code if isinstance(code, int) else 1


def as_data(graph: StageGraph, result: RunResult) -> dict[str, Any]:
    """The result for `--json`: bytes as base64, what JSON has no word for as text."""
    outputs = {}
    for name, output in result.outputs.items():
        shown: dict[str, Any] = {"status": str(output.status)}
        for key in ("data", "metadata", "skip_reason", "cancel_reason"):
            value = getattr(output, key)
            if value is not None and value != {}:
                shown[key] = value
        if output.error_info is not None:
            shown["error"] = _error_data(output.error_info)
        elif output.error is not None:
            shown["error"] = {"message": output.error}
        outputs[name] = shown
    data: dict[str, Any] = jsonable(
        {
            "pipeline": graph.name,
            "run_id": result.run_id,
            "success": result.success,
            "status": str(result.status),
            "duration_ms": result.duration_ms,
            "cancel_reason": result.cancel_reason,
            "error": result.error,
            "outputs": outputs,
            "failures": result.failures.to_dict(),
            "stats": {name: row.to_dict() for name, row in result.stats.items()},
        }
    )
    return data


def print_result(graph: StageGraph, result: RunResult, cpu: CpuSplit, *, traceback: bool = False) -> None:
    """Status, the values of the last stages, the table of stages, the failures."""
    out = console(sys.stdout)
    for index, spec in enumerate(graph.specs):
        if graph.dependents[index]:
            continue
        output = result.outputs.get(spec.name)
        if output is None:
            continue
        if output.status is StageStatus.OK:
            out.print(f"{spec.name}: {_value(output)}", soft_wrap=True)
        elif output.status is StageStatus.SKIP:
            out.print(f"{spec.name}: skipped ({output.skip_reason})", soft_wrap=True)
    out.print(stage_table(result.stats, graph.index, out.width))
    print_failures(result, traceback=traceback)
    reason = f": {result.cancel_reason}" if result.cancel_reason else ""
    out.print(
        f"{result.status}{reason} in {seconds(result.duration_ms / 1000)}, CPU {seconds(cpu.total)}"
        f" (parent {cpu.parent_share:.1%})"
    )


def print_failures(result: RunResult, *, traceback: bool = False) -> None:
    """Each failure on standard error: stage, item, lane, attempts, what was raised and where.

    Then what was left behind.
    """
    out = console(sys.stderr)
    failures = list(result.failures)
    for failure in failures[:_MAX_FAILURES]:
        out.print(f"failed: {_title(failure)}", style="red", soft_wrap=True)
        for line in _explained(failure.error_info, traceback=traceback):
            out.print(f"  {line}", soft_wrap=True)
    more = max(len(failures), result.failures.failed_items) - _MAX_FAILURES
    if more > 0:
        out.print(f"... and {more:,} more failures")
    if not failures and result.error and not result.cancelled:
        out.print(f"failed: {result.error}", style="red", soft_wrap=True)
    for left in result.abandoned:
        item = f", item {'.'.join(map(str, left.item))}" if left.item else ""
        out.print(f"still running in a thread that cannot be stopped: stage {left.stage!r}{item}", soft_wrap=True)


def _title(failure: FailureRecord) -> str:
    where = [f"stage {failure.stage!r}"]
    if failure.item:
        where.append(f"item {'.'.join(map(str, failure.item))}")
    info = failure.error_info
    if info is not None and info.lane:
        where.append(f"{info.lane} lane")
    if failure.attempts > 1:
        where.append(f"{failure.attempts} attempts")
    what = f"{info.type.removeprefix('stageflow.core.errors.')}: {info.message}" if info is not None else failure.error
    if info is not None and info.stderr_tail:
        what = what.partition("\n")[0]  # the rest of it is the end of standard error, which follows
    return f"{', '.join(where)}: {what}"


def _explained(info: ErrorInfo | None, *, traceback: bool) -> list[str]:
    if info is None:
        return []
    lines: list[str] = []
    if traceback and info.traceback:
        lines += info.traceback.rstrip().splitlines()
    elif info.traceback:
        frames = [line.strip() for line in info.traceback.splitlines() if line.lstrip().startswith("File ")]
        if frames:
            lines.append(f"at {frames[-1].removeprefix('File ')}")
    lines += [f"note: {note}" for note in info.notes]
    if info.code is not None and (hint := getattr(revive(info), "hint", None)):
        lines.append(f"-> {hint}")
    if info.signal is not None:
        lines.append(f"killed by signal {info.signal}" + (", by the kernel: out of memory" if info.oom_killed else ""))
    elif info.exit_code is not None:
        lines.append(f"exit code {info.exit_code}")
    if info.stderr_tail:
        lines.append("the end of its standard error:")
        lines += [f"  {line}" for line in info.stderr_tail.splitlines()[-8:]]
    return lines


def _error_data(info: ErrorInfo) -> dict[str, Any]:
    shown = info.to_dict()
    shown.pop("pickled", None)
    return shown


def _value(output: Any) -> str:
    if output.data is None and "items" in output.metadata:
        return f"{output.metadata['items']:,} items"
    text = repr(output.data)
    if isinstance(output.data, dict | list):
        try:
            text = msgspec.json.encode(output.data).decode()
        except (TypeError, ValueError, msgspec.MsgspecError):
            pass
    return text if len(text) <= _MAX_OUTPUT else f"{text[:_MAX_OUTPUT]}... ({len(text):,} characters)"
