"""A result, for people and for programs."""

from __future__ import annotations

import signal
import sys
from typing import Any, Final

import msgspec

from stageflow.core.kinds import StageStatus
from stageflow.core.output import ErrorInfo
from stageflow.pipeline.graph import StageGraph
from stageflow.report.terminal import CpuSplit, console, jsonable, seconds, stage_table

#: failures and outputs beyond these are counted, not listed
_MAX_FAILURES: Final = 10
_MAX_OUTPUT: Final = 400


def stopped(interrupt: BaseException) -> tuple[Any, int]:
    """What a stopped run had done (None if it had not begun), and the exit code of the signal that stopped it."""
    code = 128 + int(getattr(interrupt, "signal", None) or signal.SIGINT)
    return getattr(interrupt, "result", None), code


def as_data(graph: StageGraph, result: Any) -> dict[str, Any]:
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
            "failures": [failure for _, failure in _failures(result)],
            "stats": {name: row.to_dict() for name, row in result.stats.items()},
        }
    )
    return data


def print_result(graph: StageGraph, result: Any, cpu: CpuSplit, *, traceback: bool = False) -> None:
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
    out.print(stage_table(result.stats.values()))
    print_failures(result, traceback=traceback)
    reason = f": {result.cancel_reason}" if result.cancel_reason else ""
    out.print(
        f"{result.status}{reason} in {seconds(result.duration_ms / 1000)}, CPU {seconds(cpu.total)}"
        f" (parent {cpu.parent_share:.1%})"
    )


def print_failures(result: Any, *, traceback: bool = False) -> None:
    """Each failure on standard error: stage, item, lane, attempt, what was raised and where.

    Then what was left behind.
    """
    out = console(sys.stderr)
    failures = _failures(result)
    for title, info in failures[:_MAX_FAILURES]:
        out.print(f"failed: {title}", style="red", soft_wrap=True)
        if isinstance(info, ErrorInfo):
            for line in _explained(info, traceback=traceback):
                out.print(f"  {line}", soft_wrap=True)
    if len(failures) > _MAX_FAILURES:
        out.print(f"... and {len(failures) - _MAX_FAILURES} more failures (--json lists them)")
    if not failures and result.error and not result.cancelled:
        out.print(f"failed: {result.error}", style="red", soft_wrap=True)
    for left in getattr(result, "abandoned", ()) or ():
        out.print(f"abandoned: {left}", soft_wrap=True)


def _failures(result: Any) -> list[tuple[str, Any]]:
    """(title, error info) of each failed item, and of each failed stage that has no failed item."""
    found: list[tuple[str, Any]] = []
    items = getattr(result.failures, "items", ())
    listed = list(items() if callable(items) else items)
    stages = set()
    for failure in listed:
        info = getattr(failure, "error_info", None) or failure
        stage = getattr(failure, "stage", "")
        stages.add(stage)
        found.append((_title(stage, info), info))
    for name, output in result.outputs.items():
        if output.status is StageStatus.FAIL and name not in stages:
            info = output.error_info
            found.append((_title(name, info) if info is not None else f"stage {name!r}: {output.error}", info))
    return found


def _title(stage: str, info: Any) -> str:
    where = [f"stage {stage!r}"]
    if getattr(info, "item", None) is not None:
        where.append(f"item {'.'.join(map(str, info.item))}")
    if getattr(info, "lane", None):
        where.append(f"{info.lane} lane")
    if (getattr(info, "attempt", None) or 1) > 1:
        where.append(f"attempt {info.attempt}")
    return f"{', '.join(where)}: {getattr(info, 'type', '')}: {getattr(info, 'message', info)}"


def _explained(info: ErrorInfo, *, traceback: bool) -> list[str]:
    lines: list[str] = []
    if traceback and info.traceback:
        lines += info.traceback.rstrip().splitlines()
    elif info.traceback:
        frames = [line.strip() for line in info.traceback.splitlines() if line.lstrip().startswith("File ")]
        if frames:
            lines.append(f"at {frames[-1].removeprefix('File ')}")
    lines += [f"note: {note}" for note in info.notes]
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
