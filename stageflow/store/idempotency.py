"""Doing a piece of work once per key: what is kept, who may work on it, and who waits.

The first to claim a key works; whoever comes meanwhile waits and then gets its result. A result is kept only if it was
a success. A claim is a lease: it ends when it is released, when its owner is known to be dead, or when it runs out
unrenewed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterable
from enum import StrEnum
from typing import Any, Final, Protocol, runtime_checkable

import msgspec

from stageflow.core.errors import IdempotencyMismatchError, StageflowError
from stageflow.store.keys import hash_parameters
from stageflow.store.owner import Owner

_log = logging.getLogger("stageflow.idempotency")

#: seconds; renewed at a third of it while the work goes on
LEASE_SECONDS: Final = 30.0
#: seconds between looks at a key that another process works on: first and longest
_POLL: Final = (0.02, 0.5)
_PURGE_EVERY: Final = 512  # writes between sweeps of expired results


class CachedResult(msgspec.Struct, frozen=True):
    """A kept result. Times are Unix seconds; `expires_at` None keeps it for ever."""

    output: Any
    params_hash: str | None = None
    expires_at: float | None = None
    created_at: float = msgspec.field(default_factory=time.time)

    def with_ttl_seconds(self, ttl_seconds: float | None) -> CachedResult:
        """A copy that expires `ttl_seconds` after it was created."""
        expires_at = None if ttl_seconds is None else self.created_at + ttl_seconds
        return msgspec.structs.replace(self, expires_at=expires_at)

    def is_expired(self, now: float) -> bool:
        """True from the very second of expiry."""
        return self.expires_at is not None and now >= self.expires_at


class Claim(msgspec.Struct, frozen=True):
    """The right to work on a key until `expires_at` (Unix seconds). `token` tells it from every other claim."""

    key: str
    token: str
    expires_at: float


class Busy(msgspec.Struct, frozen=True):
    """Somebody else works on the key. `local`: in this process, so that `settled` of the store will be told."""

    key: str
    owner: Owner
    expires_at: float
    local: bool = False


@runtime_checkable
class IdempotencyStore(Protocol):
    """Where results and claims are kept. Every method may be called from several loops and threads at once."""

    async def get(self, key: str) -> CachedResult | None:
        """The result of a key unless there is none or it expired."""
        ...

    async def set(self, key: str, entry: CachedResult, ttl_seconds: float | None = None) -> None:
        """Keep a result, replacing another; `ttl_seconds` overrides its expiry."""
        ...

    async def delete(self, key: str) -> bool:
        """Forget a result; True if there was one. A claim stays."""
        ...

    async def clear(self) -> None:
        """Forget every result and claim."""
        ...

    async def claim(self, key: str, *, lease_seconds: float = LEASE_SECONDS) -> CachedResult | Claim | Busy:
        """The kept result; or else the right to work, if nobody living has it."""
        ...

    async def renew(self, claim: Claim, lease_seconds: float = LEASE_SECONDS) -> bool:
        """Extend a lease; False if it was lost."""
        ...

    async def release(self, claim: Claim, entry: CachedResult | None = None) -> bool:
        """Give up a claim and, in the same step, keep its result. False if the claim was lost.

        The result of a lost claim is kept all the same, unless somebody else's is there. NotShippableError if the
        result cannot be kept: the claim is given up nevertheless.
        """
        ...


class Waiters:
    """Wakes coroutines, on whatever loop, when a key of this process is settled. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}

    async def wait(self, key: str, look: Callable[[], Awaitable[Any]], timeout: float | None) -> Any:
        """Wait for `settled(key)`, or None after `timeout` seconds.

        `look` is awaited once waiting began, so that no settling is missed; what it sees other than Busy is the answer.
        """
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        with self._lock:
            self._waiting.setdefault(key, set()).add((loop, event))
        try:
            seen = await look()
            if not isinstance(seen, Busy):
                return seen
            try:
                async with asyncio.timeout(timeout):
                    await event.wait()
            except TimeoutError:
                pass
            return None
        finally:
            with self._lock:
                waiting = self._waiting.get(key)
                if waiting is not None:
                    waiting.discard((loop, event))
                    if not waiting:
                        del self._waiting[key]

    def settled(self, key: str) -> None:
        """Wake everyone who waits for the key."""
        with self._lock:
            waiting = list(self._waiting.get(key, ()))
        for loop, event in waiting:
            try:
                loop.call_soon_threadsafe(event.set)
            except RuntimeError:
                pass  # that loop is closed, and with it whoever waited


class InMemoryIdempotencyStore:
    """Results of this process, as they are (not copied). `clock` gives Unix seconds.

    Expired results are dropped when they are read, and all of them now and then.
    """

    def __init__(self, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._entries: dict[str, CachedResult] = {}
        self._claims: dict[str, Claim] = {}
        self._lock = threading.Lock()
        self._writes = 0
        self.waiters = Waiters()

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def is_empty(self) -> bool:
        """True without results."""
        return not self._entries

    def _get(self, key: str, now: float) -> CachedResult | None:
        entry = self._entries.get(key)
        if entry is not None and entry.is_expired(now):
            del self._entries[key]
            return None
        return entry

    def _set(self, key: str, entry: CachedResult, now: float) -> None:
        self._entries[key] = entry
        self._writes += 1
        if self._writes % _PURGE_EVERY == 0:
            for old in [each for each, kept in self._entries.items() if kept.is_expired(now)]:
                del self._entries[old]

    async def get(self, key: str) -> CachedResult | None:
        """See `IdempotencyStore`."""
        with self._lock:
            return self._get(key, self._clock())

    async def set(self, key: str, entry: CachedResult, ttl_seconds: float | None = None) -> None:
        """See `IdempotencyStore`."""
        now = self._clock()
        if ttl_seconds is not None:
            entry = msgspec.structs.replace(entry, expires_at=now + ttl_seconds)
        with self._lock:
            self._set(key, entry, now)
        self.waiters.settled(key)

    async def delete(self, key: str) -> bool:
        """See `IdempotencyStore`."""
        with self._lock:
            return self._entries.pop(key, None) is not None

    async def clear(self) -> None:
        """See `IdempotencyStore`."""
        with self._lock:
            claimed = list(self._claims)
            self._entries.clear()
            self._claims.clear()
        for key in claimed:
            self.waiters.settled(key)

    async def claim(self, key: str, *, lease_seconds: float = LEASE_SECONDS) -> CachedResult | Claim | Busy:
        """See `IdempotencyStore`."""
        now = self._clock()
        with self._lock:
            entry = self._get(key, now)
            if entry is not None:
                return entry
            held = self._claims.get(key)
            if held is not None and now < held.expires_at:
                return Busy(key, Owner.me(), held.expires_at, local=True)
            claim = self._claims[key] = Claim(key, new_token(), now + lease_seconds)
            return claim

    async def renew(self, claim: Claim, lease_seconds: float = LEASE_SECONDS) -> bool:
        """See `IdempotencyStore`."""
        with self._lock:
            held = self._claims.get(claim.key)
            if held is None or held.token != claim.token:
                return False
            self._claims[claim.key] = msgspec.structs.replace(held, expires_at=self._clock() + lease_seconds)
            return True

    async def release(self, claim: Claim, entry: CachedResult | None = None) -> bool:
        """See `IdempotencyStore`."""
        now = self._clock()
        with self._lock:
            held = self._claims.get(claim.key)
            ours = held is not None and held.token == claim.token
            if ours:
                del self._claims[claim.key]
            if entry is not None and (ours or self._get(claim.key, now) is None):
                self._set(claim.key, entry, now)
        self.waiters.settled(claim.key)
        return ours


def new_token() -> str:
    """A random name for a claim."""
    return os.urandom(12).hex()


# ---------------------------------------------------------------- asking


class IdempotencyOutcome(StrEnum):
    """What a look-up found."""

    NOT_FOUND = "not_found"
    FOUND = "found"
    PARAM_MISMATCH = "param_mismatch"


class IdempotencyCheck(msgspec.Struct, frozen=True):
    """A look-up: the entry where found, both hashes on a mismatch."""

    outcome: IdempotencyOutcome
    key: str
    entry: CachedResult | None = None
    expected: str | None = None
    actual: str | None = None


async def check_idempotency(
    store: IdempotencyStore,
    key: str,
    params: Any,
    *,
    fields: Iterable[str] | None = None,
    enforce_params_match: bool = True,
) -> IdempotencyCheck:
    """Look a key up without claiming it. A mismatch needs enforcement and an entry that has a hash."""
    entry = await store.get(key)
    if entry is None:
        return IdempotencyCheck(IdempotencyOutcome.NOT_FOUND, key)
    actual = hash_parameters(params, fields)
    if enforce_params_match and entry.params_hash is not None and entry.params_hash != actual:
        return IdempotencyCheck(IdempotencyOutcome.PARAM_MISMATCH, key, None, entry.params_hash, actual)
    return IdempotencyCheck(IdempotencyOutcome.FOUND, key, entry)


class Hit(msgspec.Struct, frozen=True):
    """The work was done before: `output` is its result. `waited` if another attempt was still at it when we came."""

    output: Any
    entry: CachedResult
    waited: bool = False


class Held(msgspec.Struct):
    """The right to do the work, from `begin` to `finish`. Its lease is renewed meanwhile."""

    claim: Claim
    params_hash: str | None
    ttl_seconds: float | None
    renewal: asyncio.Task[None] | None = None
    lost: bool = False  #: the lease ran out: another process may be doing the work too


class IdempotencyGuard:
    """What a driver calls around an attempt: `begin` before it, `finish` after it, whatever happened.

    Belongs to the loop it is used on; any number of guards, in any number of processes, may share a store.
    """

    def __init__(
        self,
        store: IdempotencyStore,
        *,
        lease_seconds: float = LEASE_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.store = store
        # A claim in memory ends with its process anyway: it needs no lease, and no timer to renew it.
        self._lease = math.inf if isinstance(store, InMemoryIdempotencyStore) else lease_seconds
        self._clock = clock
        waiters = getattr(store, "waiters", None)
        self._waiters: Waiters = waiters if isinstance(waiters, Waiters) else Waiters()

    async def begin(
        self, key: str, params_hash: str | None = None, ttl_seconds: float | None = 3600, enforce: bool = True
    ) -> Hit | Held:
        """The result of earlier work, or the right to do it. Waits while somebody else does it; safe to cancel.

        `ttl_seconds` says how long a success will be kept (None: for ever).

        Raises:
            IdempotencyMismatchError: the kept result belongs to other parameters (fields `key`, `expected`, `actual`).
        """
        waited = False
        pause, longest = _POLL
        found = await self.store.claim(key, lease_seconds=self._lease)
        while True:
            if isinstance(found, Claim):
                held = Held(found, params_hash, ttl_seconds)
                if self._lease < math.inf:
                    held.renewal = asyncio.get_running_loop().create_task(self._renew(held))
                return held
            if isinstance(found, CachedResult):
                if enforce and None not in (found.params_hash, params_hash) and found.params_hash != params_hash:
                    raise IdempotencyMismatchError(
                        f"the idempotency key {key!r} was used before with other parameters",
                        hint="use another key for other parameters, or enforce_params_match=False",
                        key=key,
                        expected=found.params_hash,
                        actual=params_hash,
                    )
                return Hit(found.output, found, waited)
            waited = True
            left = found.expires_at - self._clock()
            timeout = max(0.001, left if found.local else min(left, pause))
            pause = min(pause * 2, longest)

            async def look() -> CachedResult | Claim | Busy:
                return await self.store.claim(key, lease_seconds=self._lease)

            seen = await self._waiters.wait(key, look, timeout if timeout < math.inf else None)
            found = seen if seen is not None else await look()

    async def finish(self, held: Held, output: Any = None, *, success: bool | None = None) -> bool:
        """End the work: keep `output`, or with None let the next in line try. True if the result was kept.

        `success=True` keeps a result that is None. What cannot be stored is not kept, with a warning: the attempt
        itself did not fail.
        """
        if held.renewal is not None:
            held.renewal.cancel()
        keep = output is not None if success is None else success
        entry = None
        if keep:
            now = self._clock()
            entry = CachedResult(output, held.params_hash, None, now).with_ttl_seconds(held.ttl_seconds)
        try:
            await self.store.release(held.claim, entry)
        except StageflowError as error:
            _log.warning("the result for %s is not kept: %s", held.claim.key, error)
            keep = False
        finally:
            self._waiters.settled(held.claim.key)
        return keep

    async def _renew(self, held: Held) -> None:
        while not held.lost:
            await asyncio.sleep(self._lease / 3)
            try:
                held.lost = not await self.store.renew(held.claim, self._lease)
            except Exception as error:
                _log.warning("the lease on %s could not be renewed: %s", held.claim.key, error)
        _log.warning("the lease on %s was lost; another process may do the same work", held.claim.key)
