"""Approval requests in a SQLite file: another process may decide, and a killed one finds its question again.

One file may be open in any number of processes (write-ahead log). A waiting process looks every `poll_interval` seconds
and is woken at once by a decision made in itself. Times are the wall clock's: it is the only one processes share.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec

from stageflow.core.errors import DefinitionError
from stageflow.tools.approval import ApprovalRequest, Approvals, ApprovalStatus, same_question

__all__ = ["SQLiteApprovals"]

COLUMNS: Final = ApprovalRequest.__struct_fields__
TABLE: Final = """
CREATE TABLE IF NOT EXISTS approvals (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, tool TEXT NOT NULL, message TEXT NOT NULL,
    arguments TEXT NOT NULL, requested_by TEXT, run_id TEXT, stage TEXT, key TEXT, created_at REAL NOT NULL,
    expires_at REAL, status TEXT NOT NULL, decided_by TEXT, decided_at REAL, reason TEXT
)"""
# One living request per key, whatever processes do; one that timed out or was withdrawn gives its key free.
ONE_PER_KEY: Final = """
CREATE UNIQUE INDEX IF NOT EXISTS approvals_key ON approvals (key)
WHERE key IS NOT NULL AND status IN ('pending', 'approved', 'denied')"""
PENDING: Final = "CREATE INDEX IF NOT EXISTS approvals_pending ON approvals (place) WHERE status = 'pending'"
BUSY_SECONDS: Final = 30.0


class SQLiteApprovals(Approvals):
    """Requests in the file `path`, made with its folders where missing, readable by its owner only.

    Every answer is on disk before the call that gave it returns. Safe from threads and across forks: each call opens
    the file for itself.
    """

    durable = True

    def __init__(
        self,
        path: str | Path,
        *,
        poll_interval: float = 0.5,
        wall: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        if poll_interval <= 0:
            raise DefinitionError(f"poll_interval is above 0 seconds, not {poll_interval}", poll_interval=poll_interval)
        super().__init__(wall, sleep)
        self.path = Path(path)
        self.poll_interval = poll_interval
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
        try:
            with self._open() as database:
                database.execute("PRAGMA journal_mode=WAL")
                for statement in (TABLE, ONE_PER_KEY, PENDING):
                    database.execute(statement)
        except sqlite3.DatabaseError as error:
            raise DefinitionError(f"{self.path} cannot be used for approvals: {error}", path=str(self.path)) from error

    def _add(self, asked: ApprovalRequest, timeout: float | None) -> ApprovalRequest:
        with self._writing() as database:
            self._expire(database)
            if asked.key is not None:
                living = "key = ? AND status IN ('pending', 'approved', 'denied')"
                found = self._select(database, living, (asked.key,))
                if found:
                    return same_question(found[0], asked)
            marks = ", ".join("?" for _ in COLUMNS)
            database.execute(
                f"INSERT INTO approvals ({', '.join(COLUMNS)}) VALUES ({marks})",
                [str(value) if name == "status" else value for name, value in _fields(asked).items()],
            )
        return asked

    def pending_requests(self) -> list[ApprovalRequest]:
        """What waits for an answer, oldest first."""
        return self.list_requests(ApprovalStatus.PENDING)

    def list_requests(self, status: ApprovalStatus | None = None) -> list[ApprovalRequest]:
        """All requests, or those of one status, oldest first."""
        with self._open() as database:
            found = self._select(database, "? IS NULL OR status = ? OR status = 'pending'", (status, status))
        settled = [self._as_of_now(one) for one in found]
        return [one for one in settled if status is None or one.status is status]

    def find(self, prefix: str) -> list[ApprovalRequest]:
        """Requests whose id starts with `prefix`: people type a few characters of it."""
        return [one for one in self.list_requests() if one.id.startswith(prefix)]

    def _look(self, request_id: str) -> tuple[ApprovalRequest | None, float | None]:
        with self._open() as database:
            found = self._select(database, "id = ?", (request_id,))
        if not found:
            return None, None
        settled = self._as_of_now(found[0])
        if settled.status is not found[0].status:
            with self._writing() as database:
                self._expire(database)
                settled = self._select(database, "id = ?", (request_id,))[0]
        if settled.expires_at is None:
            return settled, self.poll_interval
        return settled, min(self.poll_interval, max(0.0, settled.expires_at - self._wall()))

    def _as_of_now(self, found: ApprovalRequest) -> ApprovalRequest:
        """A pending request whose time is up reads as timed out, written so or not yet."""
        expired = found.expires_at is not None and found.expires_at <= self._wall()
        if found.status is not ApprovalStatus.PENDING or not expired:
            return found
        return msgspec.structs.replace(found, status=ApprovalStatus.TIMED_OUT, decided_at=found.expires_at)

    def _expire(self, database: sqlite3.Connection) -> None:
        database.execute(
            "UPDATE approvals SET status = 'timed_out', decided_at = expires_at"
            " WHERE status = 'pending' AND expires_at <= ?",
            (self._wall(),),
        )

    def _decide(self, request_id: str, status: ApprovalStatus, by: str | None, reason: str | None) -> bool:
        now = self._wall()
        with self._writing() as database:
            changed = database.execute(
                "UPDATE approvals SET status = ?, decided_by = ?, decided_at = ?, reason = ?"
                " WHERE id = ? AND status = 'pending' AND (expires_at IS NULL OR expires_at > ?)",
                (str(status), by, now, reason, request_id, now),
            ).rowcount
        if changed:
            self._wake(request_id)
        return bool(changed)

    @staticmethod
    def _select(database: sqlite3.Connection, where: str, values: tuple[Any, ...]) -> list[ApprovalRequest]:
        rows = database.execute(
            f"SELECT {', '.join(COLUMNS)} FROM approvals WHERE {where} ORDER BY place", values
        ).fetchall()
        return [msgspec.convert(dict(zip(COLUMNS, row, strict=True)), ApprovalRequest) for row in rows]

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)) as database:
            database.execute("PRAGMA synchronous=FULL")
            yield database

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction that has the write lock from its start, so that nothing changes between look and write."""
        with self._open() as database:
            database.execute("BEGIN IMMEDIATE")
            try:
                yield database
            except BaseException:
                database.execute("ROLLBACK")
                raise
            database.execute("COMMIT")


def _fields(request: ApprovalRequest) -> dict[str, Any]:
    return {name: getattr(request, name) for name in COLUMNS}
