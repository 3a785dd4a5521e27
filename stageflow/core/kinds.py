"""The words every room shares: what a stage is for, how it ended, and where an attempt runs."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Final, final

#: annotations of values -> the classes of which every instance fits; what everything else needs a checker for
SURE: Final[Mapping[type, frozenset[type]]] = {
    int: frozenset({int}),
    float: frozenset({float, int}),
    str: frozenset({str}),
    bool: frozenset({bool}),
    bytes: frozenset({bytes}),
}


class StageKind(StrEnum):
    """What a stage is for. Decides its default lane (`stageflow plan` prints the row that applied)."""

    TRANSFORM = "transform"  #: changes the form of the data: CPU-bound
    ENRICH = "enrich"  #: adds context from elsewhere
    ROUTE = "route"  #: chooses between branches
    GUARD = "guard"  #: validates or enforces a policy
    WORK = "work"  #: performs a side effect
    AGENT = "agent"  #: the main interactor


class StageStatus(StrEnum):
    """How a stage stands or ended. SKIP counts as success, CANCEL as failure; RETRY is neither and never terminal."""

    OK = "ok"
    SKIP = "skip"
    CANCEL = "cancel"
    FAIL = "fail"
    RETRY = "retry"
    PENDING = "pending"
    RUNNING = "running"

    @property
    def is_terminal(self) -> bool:
        """True for OK, SKIP, CANCEL and FAIL."""
        return self in _TERMINAL

    @property
    def is_success(self) -> bool:
        """True for OK and SKIP."""
        return self is StageStatus.OK or self is StageStatus.SKIP

    @property
    def is_failure(self) -> bool:
        """True for FAIL and CANCEL."""
        return self is StageStatus.FAIL or self is StageStatus.CANCEL


_TERMINAL: Final = frozenset({StageStatus.OK, StageStatus.SKIP, StageStatus.CANCEL, StageStatus.FAIL})


class Lane(StrEnum):
    """Where an attempt runs."""

    ASYNC = "async"
    THREAD = "thread"
    PROCESS = "process"
    INLINE = "inline"  #: everything in the calling thread, in deterministic order: for debugging
    DASK = "dask"  #: a distributed cluster, named by STAGEFLOW_DASK or the current client
    RAY = "ray"  #: not built: the engine takes an executor of yours for it


class FailureMode(StrEnum):
    """What the failure of a stage does to the rest of its run."""

    FAIL_FAST = "fail_fast"  #: the run ends at the first failure
    CONTINUE_ON_FAILURE = "continue_on_failure"  #: descendants end SKIP, the rest runs
    BEST_EFFORT = "best_effort"  #: everything runs with the inputs that exist


@final
class Drop:
    """The type of `DROP`: a map runner returns it to remove its element from the stream."""

    __slots__ = ()
    _only: Drop | None = None

    def __new__(cls) -> Drop:
        if cls._only is None:
            cls._only = super().__new__(cls)
        return cls._only

    def __repr__(self) -> str:
        return "DROP"

    def __reduce__(self) -> str:
        return "DROP"  # by reference: identity survives a process boundary


DROP: Final = Drop()


@final
class Unset:
    """The type of `UNSET`: tells an omitted keyword from an explicit None."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "UNSET"

    def __bool__(self) -> bool:
        return False

    def __reduce__(self) -> str:
        return "UNSET"


UNSET: Final = Unset()
