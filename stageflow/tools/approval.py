"""Asks a human before something runs: requests that can be read, and answers that say who gave them and why.

Approved, denied, cancelled and timed out are four different ends. `InMemoryApprovals` serves one process;
`approval_sqlite.SQLiteApprovals` lets another process decide and outlives both. Clocks and the sleep are arguments.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Any, Final, Protocol

import msgspec

from stageflow.core.errors import DefinitionError
from stageflow.tools.errors import ApprovalCancelledError, ApprovalMismatchError, ApprovalTimeoutError

__all__ = [
    "ApprovalRequest",
    "ApprovalService",
    "ApprovalStatus",
    "Approvals",
    "InMemoryApprovals",
    "arguments_as_json",
]

DEFAULT_MESSAGE: Final = "This action needs approval."
MAX_ARGUMENTS: Final = 64 * 1024  # bytes of JSON: what a human could still read before deciding


class ApprovalStatus(StrEnum):
    """How a request stands."""

    PENDING = "pending"
    APPROVED = "approved"
    DENIED = "denied"
    TIMED_OUT = "timed_out"
    CANCELLED = "cancelled"

    @property
    def is_decision(self) -> bool:
        """Whether somebody said yes or no; a timeout and a withdrawal are no answers."""
        return self in {ApprovalStatus.APPROVED, ApprovalStatus.DENIED}


class ApprovalRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One question to a human: who asks, for what, with which arguments, why, until when; and how it ended.

    Times are seconds since 1970; `expires_at` None waits for ever. `arguments` is JSON text, exactly what will be used.
    """

    id: str
    tool: str
    message: str
    arguments: str = "{}"
    requested_by: str | None = None
    run_id: str | None = None
    stage: str | None = None
    key: str | None = None
    created_at: float = 0.0
    expires_at: float | None = None
    status: ApprovalStatus = ApprovalStatus.PENDING
    decided_by: str | None = None
    decided_at: float | None = None
    reason: str | None = None

    @property
    def question(self) -> str:
        """A digest of what is asked: two requests with equal ones can share an answer."""
        asked = msgspec.json.encode([self.tool, self.arguments])
        return hashlib.sha256(asked).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Every field; `arguments` decoded."""
        return {**msgspec.to_builtins(self), "arguments": msgspec.json.decode(self.arguments)}


class ApprovalService(Protocol):
    """Where requests wait for an answer. Everything but `wait` returns at once and may be called from any thread."""

    durable: bool  #: whether requests outlive this process

    def request(
        self,
        tool: str,
        message: str | None = None,
        *,
        timeout: float | None = 300.0,
        arguments: Any = None,
        requested_by: str | None = None,
        run_id: str | None = None,
        stage: str | None = None,
        key: str | None = None,
    ) -> ApprovalRequest:
        """Ask; `timeout` in seconds. With a `key` that has a pending request or an answer already, that is returned.

        Raises:
            ApprovalMismatchError: the key belongs to a request for another tool or other arguments.
        """

    async def wait(self, request_id: str) -> ApprovalRequest:
        """Return the request once it is not pending any more. Stopping to wait leaves it as it is."""

    def approve(self, request_id: str, *, by: str | None = None, reason: str | None = None) -> bool:
        """Say yes; False where the request is unknown, over or too late."""

    def deny(self, request_id: str, *, by: str | None = None, reason: str | None = None) -> bool:
        """Say no; False where the request is unknown, over or too late."""

    def cancel(self, request_id: str, *, by: str | None = None, reason: str | None = None) -> bool:
        """Withdraw the question; False where the request is unknown, over or too late."""

    def get(self, request_id: str) -> ApprovalRequest | None:
        """The request as it stands."""

    def pending_requests(self) -> list[ApprovalRequest]:
        """What waits for an answer, oldest first."""


class Approvals(ABC):
    """What both services share: asking, answering and waiting. How requests are kept is the subclass's."""

    durable = False

    def __init__(self, wall: Callable[[], float], sleep: Callable[[float], Awaitable[object]]) -> None:
        self._wall = wall
        self._sleep = sleep
        self._waiters: dict[str, list[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self._waiters_lock = threading.Lock()

    async def request_approval(
        self, tool: str, message: str | None = None, timeout: float | None = 300.0, **details: Any
    ) -> bool:
        """Ask and wait: True for yes, False for no. Stopping to wait withdraws the request, unless it has a key.

        Raises:
            ApprovalTimeoutError: nobody decided within `timeout` seconds.
            ApprovalCancelledError: the request was withdrawn.
        """
        asked = self.request(tool, message, timeout=timeout, **details)
        try:
            ended = await self.wait(asked.id)
        except asyncio.CancelledError:
            if asked.key is None:
                self.cancel(asked.id, reason="nobody waits for the answer any more")
            raise
        raise_unless_decided(ended, timeout)
        return ended.status is ApprovalStatus.APPROVED

    def request(
        self,
        tool: str,
        message: str | None = None,
        *,
        timeout: float | None = 300.0,
        arguments: Any = None,
        requested_by: str | None = None,
        run_id: str | None = None,
        stage: str | None = None,
        key: str | None = None,
    ) -> ApprovalRequest:
        """Ask; a key finds its pending or answered request again. See `ApprovalService.request`."""
        if timeout is not None and timeout <= 0:
            raise DefinitionError(f"an approval timeout is above 0 seconds or None, not {timeout}", timeout=timeout)
        now = self._wall()
        return self._add(
            ApprovalRequest(
                id=str(uuid.uuid4()),
                tool=tool,
                message=message or DEFAULT_MESSAGE,
                arguments=arguments_as_json(arguments),
                requested_by=requested_by,
                run_id=run_id,
                stage=stage,
                key=key,
                created_at=now,
                expires_at=None if timeout is None else now + timeout,
            ),
            timeout,
        )

    def get(self, request_id: str) -> ApprovalRequest | None:
        """The request as it stands."""
        return self._look(request_id)[0]

    @abstractmethod
    def pending_requests(self) -> list[ApprovalRequest]:
        """What waits for an answer, oldest first."""

    @property
    def pending_count(self) -> int:
        """How many wait for an answer."""
        return len(self.pending_requests())

    def approve(self, request_id: str, *, by: str | None = None, reason: str | None = None) -> bool:
        """Say yes; False where the request is unknown, over or too late."""
        return self._decide(request_id, ApprovalStatus.APPROVED, by, reason)

    def deny(self, request_id: str, *, by: str | None = None, reason: str | None = None) -> bool:
        """Say no; False where the request is unknown, over or too late."""
        return self._decide(request_id, ApprovalStatus.DENIED, by, reason)

    def cancel(self, request_id: str, *, by: str | None = None, reason: str | None = None) -> bool:
        """Withdraw the question; False where the request is unknown, over or too late."""
        return self._decide(request_id, ApprovalStatus.CANCELLED, by, reason)

    async def wait(self, request_id: str) -> ApprovalRequest:
        """Return the request once it is not pending any more.

        Raises:
            DefinitionError: there is no such request.
        """
        waiter = (asyncio.get_running_loop(), asyncio.Event())
        with self._waiters_lock:
            self._waiters.setdefault(request_id, []).append(waiter)
        try:
            while True:
                waiter[1].clear()
                found, pause = self._look(request_id)
                if found is None:
                    raise DefinitionError(f"there is no approval request {request_id!r}", request_id=request_id)
                if found.status is not ApprovalStatus.PENDING:
                    return found
                await self._pause(waiter[1], pause)
        finally:
            with self._waiters_lock:
                waiting = self._waiters[request_id]
                waiting.remove(waiter)
                if not waiting:
                    del self._waiters[request_id]

    async def _pause(self, woken: asyncio.Event, seconds: float | None) -> None:
        """Wait for a decision made in this process, at most `seconds`."""
        if seconds is None:
            await woken.wait()
            return
        both = [asyncio.ensure_future(woken.wait()), asyncio.ensure_future(self._sleep(seconds))]
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    def _wake(self, request_id: str) -> None:
        with self._waiters_lock:
            waiting = list(self._waiters.get(request_id, ()))
        for loop, event in waiting:
            with contextlib.suppress(RuntimeError):  # its loop is closed: nobody waits there
                loop.call_soon_threadsafe(event.set)

    @abstractmethod
    def _add(self, asked: ApprovalRequest, timeout: float | None) -> ApprovalRequest:
        """Keep the request, or return the living one of its key."""

    @abstractmethod
    def _look(self, request_id: str) -> tuple[ApprovalRequest | None, float | None]:
        """The request, timed out if its time is up, and after how many seconds to look again (None: when woken)."""

    @abstractmethod
    def _decide(self, request_id: str, status: ApprovalStatus, by: str | None, reason: str | None) -> bool:
        """End a pending request and wake who waits for it here."""


def raise_unless_decided(ended: ApprovalRequest, timeout: float | None) -> None:
    """Raise for a request that ended without an answer."""
    if ended.status is ApprovalStatus.TIMED_OUT:
        raise ApprovalTimeoutError(
            f"nobody decided on {ended.tool!r} in time",
            name=ended.tool,
            request_id=ended.id,
            timeout_seconds=timeout,
        )
    if ended.status is ApprovalStatus.CANCELLED:
        raise ApprovalCancelledError(
            f"the approval request for {ended.tool!r} was cancelled" + (f": {ended.reason}" if ended.reason else ""),
            name=ended.tool,
            request_id=ended.id,
            decided_by=ended.decided_by,
            reason=ended.reason,
        )


def arguments_as_json(arguments: Any) -> str:
    """The arguments as JSON text with sorted keys; what JSON cannot say is shown by its type.

    Raises:
        DefinitionError: more than 64 KiB, which nobody could read before deciding.
    """
    try:
        text = msgspec.json.encode(
            {} if arguments is None else arguments,
            enc_hook=lambda value: f"<{type(value).__qualname__}>",
            order="deterministic",
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise DefinitionError(f"the arguments cannot be shown for approval: {error}") from error
    if len(text) > MAX_ARGUMENTS:
        raise DefinitionError(
            f"{len(text)} bytes of arguments are more than a human can approve ({MAX_ARGUMENTS})",
            hint="show what matters: give `arguments` a digest or a summary",
        )
    return text.decode()


def same_question(found: ApprovalRequest, asked: ApprovalRequest) -> ApprovalRequest:
    """Return `found` where it asks what `asked` does.

    Raises:
        ApprovalMismatchError: it asks something else.
    """
    if found.question != asked.question:
        raise ApprovalMismatchError(
            f"approval key {asked.key!r} was used for {found.tool!r} with other arguments",
            hint="put what distinguishes the requests into the key",
            name=asked.tool,
            key=asked.key,
            request_id=found.id,
        )
    return found


class InMemoryApprovals(Approvals):
    """Requests in this process. Keeps the last `history` finished ones. Thread-safe.

    Deadlines go by `clock`, which never jumps; `wall` gives the times that are shown.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        history: int = 1000,
    ) -> None:
        super().__init__(wall, sleep)
        self._clock = clock
        self._history = history
        self._requests: dict[str, ApprovalRequest] = {}
        self._deadlines: dict[str, float] = {}
        self._finished: dict[str, None] = {}  # oldest first
        self._keys: dict[str, str] = {}
        self._lock = threading.Lock()

    def _add(self, asked: ApprovalRequest, timeout: float | None) -> ApprovalRequest:
        key = asked.key
        with self._lock:
            if key is not None and key in self._keys:
                found = self._settled(self._keys[key])
                if found is not None and (found.status is ApprovalStatus.PENDING or found.status.is_decision):
                    return same_question(found, asked)
            self._requests[asked.id] = asked
            if timeout is not None:
                self._deadlines[asked.id] = self._clock() + timeout
            if key is not None:
                self._keys[key] = asked.id
            return asked

    def pending_requests(self) -> list[ApprovalRequest]:
        """What waits for an answer, oldest first."""
        with self._lock:
            open_ids = [request_id for request_id in self._requests if request_id not in self._finished]
            found = [self._settled(request_id) for request_id in open_ids]
        return [one for one in found if one is not None and one.status is ApprovalStatus.PENDING]

    def _look(self, request_id: str) -> tuple[ApprovalRequest | None, float | None]:
        with self._lock:
            found = self._settled(request_id)
            deadline = self._deadlines.get(request_id)
            return found, None if deadline is None else max(0.0, deadline - self._clock())

    def _settled(self, request_id: str) -> ApprovalRequest | None:
        """The request, ended first if its time is up. Holds the lock."""
        found = self._requests.get(request_id)
        deadline = self._deadlines.get(request_id)
        if found is None or deadline is None or self._clock() < deadline:
            return found
        return self._end(found, ApprovalStatus.TIMED_OUT, None, None)

    def _end(
        self, found: ApprovalRequest, status: ApprovalStatus, by: str | None, reason: str | None
    ) -> ApprovalRequest:
        ended = msgspec.structs.replace(found, status=status, decided_by=by, decided_at=self._wall(), reason=reason)
        self._requests[found.id] = ended
        self._deadlines.pop(found.id, None)
        self._finished[found.id] = None
        while len(self._finished) > self._history:
            # One that somebody still waits for in this process is kept until he has read it.
            forgotten = next((old for old in self._finished if old not in self._waiters), None)
            if forgotten is None:
                break
            del self._finished[forgotten]
            key = self._requests.pop(forgotten).key
            if key is not None and self._keys.get(key) == forgotten:
                del self._keys[key]
        return ended

    def _decide(self, request_id: str, status: ApprovalStatus, by: str | None, reason: str | None) -> bool:
        with self._lock:
            found = self._settled(request_id)
            if found is None or found.status is not ApprovalStatus.PENDING:
                return False
            self._end(found, status, by, reason)
        self._wake(request_id)
        return True
