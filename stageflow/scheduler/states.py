"""The states of a stage in a run, and the one table of legal moves."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final


class StageState(IntEnum):
    """Where a stage of a run stands. A map, source, reduce or sink is FLOWING from its first item to its last."""

    WAITING = 0
    DECIDING = 1  #: its `when` predicate is being evaluated
    READY = 2
    RUNNING = 3
    BACKOFF = 4
    FLOWING = 5
    DONE = 6
    SKIPPED = 7
    FAILED = 8
    CANCELLED = 9


_S = StageState

#: first state that is an end
ENDED: Final = _S.DONE

LEGAL: Final[Mapping[StageState, frozenset[StageState]]] = {
    _S.WAITING: frozenset({_S.DECIDING, _S.READY, _S.FLOWING, _S.SKIPPED, _S.FAILED, _S.CANCELLED}),
    _S.DECIDING: frozenset({_S.READY, _S.FLOWING, _S.SKIPPED, _S.FAILED, _S.CANCELLED}),
    _S.READY: frozenset({_S.RUNNING, _S.FAILED, _S.CANCELLED}),
    # RUNNING -> READY: the worker was lost, or a guard asks for the path to be run again
    _S.RUNNING: frozenset({_S.READY, _S.BACKOFF, _S.DONE, _S.SKIPPED, _S.FAILED, _S.CANCELLED, _S.WAITING}),
    _S.BACKOFF: frozenset({_S.READY, _S.FAILED, _S.CANCELLED}),
    _S.FLOWING: frozenset({_S.DONE, _S.SKIPPED, _S.FAILED, _S.CANCELLED}),
    # back to WAITING: only on a guard's retry path
    _S.DONE: frozenset({_S.WAITING}),
    _S.SKIPPED: frozenset({_S.WAITING}),
    _S.FAILED: frozenset({_S.WAITING}),
    _S.CANCELLED: frozenset(),
}

#: the same as a flat table of bytes: _ALLOWED[from * 16 + to]
ALLOWED: Final = bytes(
    1 if (old < 10 and new < 10 and StageState(new) in LEGAL[StageState(old)]) else 0
    for old in range(16)
    for new in range(16)
)
