"""Why a worker died, as data.

May import `stageflow.core` and this package only.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

from stageflow.core.errors import WorkerDiedError
from stageflow.core.failure import capture
from stageflow.core.output import ErrorInfo
from stageflow_executors.processes.machine import oom_kills

if TYPE_CHECKING:
    from stageflow_executors.processes.handle import WorkerHandle


def describe(handle: WorkerHandle, oom_before: int) -> ErrorInfo:
    """A WorkerDiedError as data. `oom_before` is the kernel's count of out-of-memory kills when all was well."""
    tail = handle.stderr_tail()
    number: int | None = None
    code: int | None = None
    rss = 0
    if handle.ended is not None:
        status, peak = handle.ended
        rss = peak * 1024
        exit_code = os.waitstatus_to_exitcode(status)
        if exit_code < 0:
            number = -exit_code
        else:
            code = exit_code
    oom = handle.shed or (number == signal.SIGKILL and not handle.killed and oom_kills() > oom_before)
    if handle.failed is not None:
        how = handle.failed
    elif number is not None:
        try:
            name = signal.Signals(number).name
        except ValueError:
            name = f"signal {number}"
        how = f"was killed by {name}" + (
            ", to keep memory from running out" if handle.shed else ", by the kernel for want of memory" if oom else ""
        )
    elif code is not None:
        how = f"exited with status {code}"
    else:
        how = "is gone; nobody said why"
    if not handle.ready:
        how += " before it could take a call"
    last = f"; its last words: {tail.strip()[-2000:]}" if tail.strip() else ""
    return capture(
        WorkerDiedError(
            f"worker {handle.pid} {how}{last}",
            worker_pid=handle.pid,
            signal=number,
            exit_code=code,
            oom_killed=oom,
            rss_bytes=rss or None,
            stderr_tail=tail or None,
        ),
        lane="process",
        worker_pid=handle.pid,
    )
