"""Gives an attempt to the thread lane when what it is called with cannot be sent to a worker."""

# mypy: disable-error-code="misc"
# The driver is spread over modules by subject; each method names Driver as its self.

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from stageflow.core.errors import NotShippableError
from stageflow.core.executor import Outcome, OutcomeKind
from stageflow.core.output import ErrorInfo
from stageflow.events import names
from stageflow.runtime.job import Job
from stageflow.runtime.running import DriverCounters, Running
from stageflow.scheduler import actions as act

if TYPE_CHECKING:
    from stageflow.runtime.driver import Driver

_ARGUMENT: Final = re.compile(r"argument (\d+)")
_POSITION: Final = re.compile(r"^\[\d+\]")  # of the element in its block
_log = logging.getLogger("stageflow")


class Moving(DriverCounters):
    """Gives an attempt to the thread lane when what it is called with cannot be sent to a worker."""

    def _moved(self: Driver, running: Running, outcome: Outcome) -> bool:
        """Start the call of `outcome` again on a thread, if nothing of it has run and nobody but the placement table
        chose the process lane for it. Of a block only the last item is moved: it is narrowed down to the one at fault.
        """
        job, action = running.job, running.action
        if outcome.started or action.lane != "process" or running.claim is not None or running.asked:
            return False
        refused = outcome.kind == OutcomeKind.REFUSED or isinstance(outcome.exception, NotShippableError)
        if not refused or action.stage not in job.code.movable or job.broken is not None:
            return False
        block = type(action) is act.StartBlock
        if block and sum(_count(segment) for segment in action.segments) > 1:
            return False
        reason = named(job, running.action, outcome.error).message if outcome.error is not None else "it cannot be sent"
        action = msgspec.structs.replace(action, lane="thread")
        self._tell_moved(job, action, reason)
        if block:
            self._start_block(action)
        elif type(action) is act.StartFold:
            self._start_fold(action)
        else:
            self._start_attempt(action, told=True)
        return True

    def _tell_moved(self: Driver, job: Job, action: Any, reason: str) -> None:
        name = job.graph.specs[action.stage].name
        data = {"lane": "thread", "reason": reason}
        self._event(names.STAGE_PLACED, job, name, None, action.attempt, "thread", data)
        if action.stage not in job.moved:
            job.moved.add(action.stage)
            _log.warning("stage %r runs on a thread what cannot be sent to a worker: %s", name, reason)


def named(job: Job, action: Any, info: ErrorInfo, before: int = 0) -> ErrorInfo:
    """`info` with the number of an argument that cannot be sent told as what its author calls it. `before`: the
    arguments that stand before its values, if it is no attempt and no block."""
    found = _ARGUMENT.match(info.message) if info.code == NotShippableError.code else None
    if found is None or type(action) is act.StartFold or job.graph.specs[action.stage].form == "graph":
        return info
    slots = job.code.stage(action.stage).program.plan.slots
    block = type(action) is act.StartBlock
    place = int(found[1]) - (before or (3 if block else 2))
    rest = info.message[found.end() :]
    if 0 <= place < len(slots):
        slot = slots[place]
        what = f"the value of stage {slot.name!r}" if slot.is_stage else f"input {slot.name!r}"
    elif block and place >= 0:
        what, rest = "the element", _POSITION.sub("", rest, count=1)
    else:
        return info
    return msgspec.structs.replace(info, message=f"{what}{rest}")


def is_argument(info: ErrorInfo) -> bool:
    """Whether it says that an argument cannot be sent: nothing has run then."""
    return info.code == NotShippableError.code and _ARGUMENT.match(info.message) is not None


def _count(segment: tuple[int, int, int, object]) -> int:
    lo, hi, mask, _ = segment
    return hi - lo if mask < 0 else mask.bit_count()
