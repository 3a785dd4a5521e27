"""Idempotency records in SQLite: for several processes on one machine, and for after a crash."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import msgspec

from stageflow.core.errors import NotShippableError
from stageflow.store.idempotency import LEASE_SECONDS, Busy, CachedResult, Claim, Waiters, new_token
from stageflow.store.owner import Owner
from stageflow.store.schema import StoreError, connect, default_folder, transaction

_log = logging.getLogger("stageflow.store")

_PURGE_EVERY = 512  # writes between sweeps of expired results

T = TypeVar("T")

_waiters: WeakValueDictionary[str, Waiters] = WeakValueDictionary()
_waiters_lock = threading.Lock()


def _waiters_of(path: Path) -> Waiters:
    """Stores of this process over one file wake each other: a claim held here is settled here."""
    key = os.path.realpath(path)
    with _waiters_lock:
        found = _waiters.get(key)
        if found is None:
            found = _waiters[key] = Waiters()
        return found


class SqliteIdempotencyStore:
    """An `IdempotencyStore` in one file. SQLite works in one thread of the store, so no loop is ever blocked.

    `path` defaults to `idempotency.db` in the user's folder for stores; it and its folder must belong to this user
    alone, because results are pickles. `clock` gives Unix seconds. Close it, or use it as a context manager.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        clock: Callable[[], float] = time.time,
        busy_seconds: float = 30.0,
        synchronous: str = "NORMAL",
    ) -> None:
        self.path = Path(path) if path is not None else default_folder() / "idempotency.db"
        self.waiters = _waiters_of(self.path)
        self._clock = clock
        self._busy_seconds = busy_seconds
        self._synchronous = synchronous
        self._lock = threading.Lock()
        self._thread: ThreadPoolExecutor | None = None
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        self._closed = False
        self._writes = 0

    # ------------------------------------------------------------ the thread

    def _submit(self, work: Callable[[sqlite3.Connection], T]) -> Future[T]:
        with self._lock:
            if self._closed:
                raise StoreError(f"the store {self.path} is closed", path=str(self.path))
            if self._thread is None or self._pid != os.getpid():
                # A connection must not be used across a fork: the child opens its own and leaves the parent's alone.
                self._connection = None
                self._thread = ThreadPoolExecutor(1, thread_name_prefix="stageflow-store")
                self._pid = os.getpid()
            return self._thread.submit(self._run, work)

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        if self._connection is None:
            self._connection = connect(self.path, busy_seconds=self._busy_seconds, synchronous=self._synchronous)
        try:
            return work(self._connection)
        except sqlite3.Error as error:
            raise StoreError(f"the store {self.path} failed: {error}", path=str(self.path)) from error

    async def _call(self, work: Callable[[sqlite3.Connection], T]) -> T:
        return await asyncio.wrap_future(self._submit(work))

    def close(self) -> None:
        """Wait for what is under way and close the file. Blocks for at most one transaction."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is None or self._pid != os.getpid():
            return
        thread.submit(self._disconnect)
        thread.shutdown(wait=True)

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    async def aclose(self) -> None:
        """`close` without blocking the loop."""
        await asyncio.get_running_loop().run_in_executor(None, self.close)

    def __enter__(self) -> SqliteIdempotencyStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> SqliteIdempotencyStore:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    # ------------------------------------------------------------ results

    def _read(self, connection: sqlite3.Connection, key: str, now: float) -> CachedResult | None:
        row = connection.execute(
            "SELECT output, params_hash, expires_at, created_at FROM idempotency WHERE key = ?", (key,)
        ).fetchone()
        if row is None or (row[2] is not None and now >= row[2]):
            return None
        try:
            # From a file of this user that nobody else can write: `schema.secure` has checked it.
            output = pickle.loads(row[0])
        except Exception as error:
            # Its class has moved or changed: then the work is simply done again.
            _log.warning("the result kept for %s cannot be read and is ignored: %r", key, error)
            return None
        return CachedResult(output, row[1], row[2], row[3])

    def _write(self, connection: sqlite3.Connection, key: str, entry: CachedResult, output: bytes) -> None:
        connection.execute(
            "INSERT OR REPLACE INTO idempotency (key, params_hash, output, created_at, expires_at)"
            " VALUES (?, ?, ?, ?, ?)",
            (key, entry.params_hash, output, entry.created_at, entry.expires_at),
        )
        self._writes += 1
        if self._writes % _PURGE_EVERY == 0:
            connection.execute("DELETE FROM idempotency WHERE expires_at <= ?", (self._clock(),))

    async def get(self, key: str) -> CachedResult | None:
        """See `IdempotencyStore`."""
        return await self._call(lambda connection: self._read(connection, key, self._clock()))

    async def set(self, key: str, entry: CachedResult, ttl_seconds: float | None = None) -> None:
        """See `IdempotencyStore`. NotShippableError if the output does not pickle."""
        if ttl_seconds is not None:
            entry = msgspec.structs.replace(entry, expires_at=self._clock() + ttl_seconds)

        def work(connection: sqlite3.Connection) -> None:
            output = _encode(entry.output)
            with transaction(connection):
                self._write(connection, key, entry, output)

        await self._call(work)
        self.waiters.settled(key)

    async def delete(self, key: str) -> bool:
        """See `IdempotencyStore`."""

        def work(connection: sqlite3.Connection) -> bool:
            with transaction(connection):
                return connection.execute("DELETE FROM idempotency WHERE key = ?", (key,)).rowcount > 0

        return await self._call(work)

    async def clear(self) -> None:
        """See `IdempotencyStore`."""

        def work(connection: sqlite3.Connection) -> list[str]:
            with transaction(connection):
                claimed = [key for (key,) in connection.execute("SELECT key FROM idempotency_claim")]
                connection.execute("DELETE FROM idempotency")
                connection.execute("DELETE FROM idempotency_claim")
            return claimed

        for key in await self._call(work):
            self.waiters.settled(key)

    async def count(self) -> int:
        """How many results are kept, expired ones not counted."""
        query = "SELECT count(*) FROM idempotency WHERE expires_at IS NULL OR expires_at > ?"
        return await self._call(lambda connection: int(connection.execute(query, (self._clock(),)).fetchone()[0]))

    async def purge(self) -> int:
        """Delete expired results and the claims of dead processes; how many results went."""

        def work(connection: sqlite3.Connection) -> int:
            now = self._clock()
            with transaction(connection):
                for key, *owner in connection.execute(_CLAIMS).fetchall():
                    if Owner(*owner).is_dead:
                        connection.execute("DELETE FROM idempotency_claim WHERE key = ?", (key,))
                connection.execute("DELETE FROM idempotency_claim WHERE expires_at <= ?", (now,))
                return connection.execute("DELETE FROM idempotency WHERE expires_at <= ?", (now,)).rowcount

        return await self._call(work)

    # ------------------------------------------------------------ claims

    def _claim(self, connection: sqlite3.Connection, key: str, lease_seconds: float) -> CachedResult | Claim | Busy:
        now, me = self._clock(), Owner.me()
        # Most calls find a result or a busy key: they need no write transaction.
        entry = self._read(connection, key, now)
        if entry is not None:
            return entry
        with transaction(connection):
            entry = self._read(connection, key, now)
            if entry is not None:
                return entry
            row = connection.execute(
                "SELECT expires_at, owner_pid, owner_started, owner_boot, owner_space FROM idempotency_claim"
                " WHERE key = ?",
                (key,),
            ).fetchone()
            if row is not None:
                owner = Owner(*row[1:])
                if now < row[0] and not owner.is_dead:
                    return Busy(key, owner, row[0], local=owner == me)
            claim = Claim(key, new_token(), now + lease_seconds)
            connection.execute(
                "INSERT OR REPLACE INTO idempotency_claim VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (key, claim.token, me.pid, me.started, me.boot, me.space, now, claim.expires_at),
            )
            return claim

    async def claim(self, key: str, *, lease_seconds: float = LEASE_SECONDS) -> CachedResult | Claim | Busy:
        """See `IdempotencyStore`. A caller cancelled meanwhile leaves no claim behind."""
        future = self._submit(lambda connection: self._claim(connection, key, lease_seconds))
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:
            future.add_done_callback(self._give_back)
            raise

    def _give_back(self, future: Future[CachedResult | Claim | Busy]) -> None:
        if future.cancelled() or future.exception() is not None:
            return
        found = future.result()
        if isinstance(found, Claim):
            try:
                self._submit(lambda connection: self._release(connection, found, None, b""))
            except StoreError:
                pass  # closed since: the lease ends with this process

    async def renew(self, claim: Claim, lease_seconds: float = LEASE_SECONDS) -> bool:
        """See `IdempotencyStore`."""

        def work(connection: sqlite3.Connection) -> bool:
            with transaction(connection):
                changed = connection.execute(
                    "UPDATE idempotency_claim SET expires_at = ? WHERE key = ? AND token = ?",
                    (self._clock() + lease_seconds, claim.key, claim.token),
                )
                return changed.rowcount > 0

        return await self._call(work)

    def _release(self, connection: sqlite3.Connection, claim: Claim, entry: CachedResult | None, output: bytes) -> bool:
        with transaction(connection):
            gone = connection.execute(
                "DELETE FROM idempotency_claim WHERE key = ? AND token = ?", (claim.key, claim.token)
            )
            ours = gone.rowcount > 0
            if entry is not None and (ours or self._read(connection, claim.key, self._clock()) is None):
                self._write(connection, claim.key, entry, output)
        self.waiters.settled(claim.key)
        return ours

    async def release(self, claim: Claim, entry: CachedResult | None = None) -> bool:
        """See `IdempotencyStore`."""

        def work(connection: sqlite3.Connection) -> bool:
            try:
                output = b"" if entry is None else _encode(entry.output)
            except NotShippableError:
                self._release(connection, claim, None, b"")
                raise
            return self._release(connection, claim, entry, output)

        # Once submitted it is done, whether or not the caller still waits.
        return await asyncio.shield(asyncio.wrap_future(self._submit(work)))


_CLAIMS = "SELECT key, owner_pid, owner_started, owner_boot, owner_space FROM idempotency_claim"


def _encode(output: Any) -> bytes:
    try:
        return pickle.dumps(output, protocol=5)
    except Exception as error:
        raise NotShippableError(
            f"a {type(output).__name__} result cannot be kept: {error}",
            hint="return data that pickles, or use an in-memory store",
            path="$",
        ) from error
